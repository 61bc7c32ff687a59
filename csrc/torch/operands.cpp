#include "operands.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include "common/parallel.h"
#include "common/status.h"

std::atomic<int64_t> advflow_launches{0};

AdvflowDtype advflow_dtype_code(at::ScalarType type, const char* name, const char* verb) {
  switch (type) {
    case at::kFloat:
      return ADVFLOW_FLOAT32;
    case at::kDouble:
      return ADVFLOW_FLOAT64;
    case at::kHalf:
      return ADVFLOW_FLOAT16;
    case at::kBFloat16:
      return ADVFLOW_BFLOAT16;
    default:
      TORCH_CHECK(false, name, verb, type, "; accepted are float32, float16, bfloat16 and float64.");
  }
}

AdvflowOperands::AdvflowOperands(const at::Tensor& v) : like_(v) {
  TORCH_CHECK(v.dim() >= 1, "v has no dimension; accepted is a batch of samples, [B, ...].");
  batch_ = v.size(0);
}

AdvflowTensor AdvflowOperands::hold(const std::optional<at::Tensor>& tensor, const char* name) {
  if (!tensor.has_value() || !tensor->defined()) return {nullptr, ADVFLOW_FLOAT32};
  TORCH_CHECK(tensor->sizes() == like_.sizes(), name, " has shape ", tensor->sizes(), "; accepted is the shape of v, ",
              like_.sizes(), ".");
  check_device(*tensor, name);
  const AdvflowDtype dtype = advflow_dtype_code(tensor->scalar_type(), name);
  accumulate_in(dtype);
  held_[count_] = tensor->contiguous();
  return {held_[count_++].const_data_ptr(), dtype};
}

void AdvflowOperands::accumulate_in(AdvflowDtype dtype) {
  if (dtype == ADVFLOW_FLOAT64) accumulate_ = at::kDouble;
}

void AdvflowOperands::check_coef(const at::Tensor& coef) const {
  TORCH_CHECK(coef.dim() == 2 && coef.size(0) == batch_ && coef.size(1) == 3, "coef has shape ", coef.sizes(),
              "; accepted is [", batch_, ", 3].");
  TORCH_CHECK(coef.scalar_type() == accumulate_, "coef has dtype ", coef.scalar_type(),
              "; accepted is the accumulate type of the inputs, ", accumulate_, ".");
  check_device(coef, "coef");
}

void AdvflowOperands::check_upstream(const at::Tensor& upstream) const {
  TORCH_CHECK(upstream.dim() == 0 || (upstream.dim() == 1 && upstream.size(0) == batch_), "upstream has shape ",
              upstream.sizes(), "; accepted are [] and [", batch_, "].");
  TORCH_CHECK(upstream.scalar_type() == accumulate_, "upstream has dtype ", upstream.scalar_type(),
              "; accepted is the accumulate type of the inputs, ", accumulate_, ".");
  check_device(upstream, "upstream");
}

void AdvflowOperands::check_device(const at::Tensor& tensor, const char* name) const {
  TORCH_CHECK(tensor.device() == like_.device(), name, " is on ", tensor.device(), "; accepted is the device of v, ",
              like_.device(), ".");
}

void advflow_check_status(int status, const char* op) {
  TORCH_CHECK(
      status != ADVFLOW_UNSUPPORTED_DTYPE, op,
      " received float64 on CUDA; accepted there are float32, float16 and bfloat16 (float64 is served on CPU).");
  TORCH_CHECK(status == ADVFLOW_OK, op, " failed to launch with CUDA error ", -status, ".");
}

namespace {

void run_parallel(int64_t count, void (*body)(void*, int64_t, int64_t), void* context) {
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) { body(context, begin, end); });
}

const AdvflowParallelFor torch_threads = {run_parallel};

}  // namespace

void* advflow_torch_threads() { return const_cast<AdvflowParallelFor*>(&torch_threads); }
