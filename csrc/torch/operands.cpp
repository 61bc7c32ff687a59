#include "operands.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/parallel.h"
#include "common/status.h"

std::atomic<int64_t> advflow_launches{0};

// ---------------------------------------------------------------------------
// Checks

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

void advflow_check_given(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK(tensor.defined(), name, " is None; accepted is a tensor.");
}

void advflow_check_served(at::ScalarType accumulate, at::Device device, const char* op) {
  TORCH_CHECK(
      accumulate != at::kDouble || !device.is_cuda(), op,
      " received float64 on CUDA; accepted there are float32, float16 and bfloat16 (float64 is served on CPU).");
}

AdvflowOperands::AdvflowOperands(const at::Tensor& v) : like_(v) {
  advflow_check_given(v, "v");
  TORCH_CHECK(v.dim() >= 1, "v has no dimension; accepted is a batch of samples, [B, ...].");
  batch_ = v.size(0);
  check(v, "v");
}

void AdvflowOperands::check(const at::Tensor& tensor, const char* name) {
  advflow_check_given(tensor, name);
  TORCH_CHECK(tensor.sizes() == like_.sizes(), name, " has shape ", tensor.sizes(), "; accepted is the shape of v, ",
              like_.sizes(), ".");
  check_device(tensor, name);
  accumulate_in(advflow_dtype_code(tensor.scalar_type(), name));
}

void AdvflowOperands::check_if_given(const std::optional<at::Tensor>& tensor, const char* name) {
  if (tensor.has_value() && tensor->defined()) check(*tensor, name);
}

void AdvflowOperands::accumulate_in(AdvflowDtype dtype) {
  if (dtype == ADVFLOW_FLOAT64) accumulate_ = at::kDouble;
}

void AdvflowOperands::check_served(const char* op) const { advflow_check_served(accumulate_, like_.device(), op); }

void AdvflowOperands::check_coef(const at::Tensor& coef) const {
  advflow_check_given(coef, "coef");
  TORCH_CHECK(coef.dim() == 2 && coef.size(0) == batch_ && coef.size(1) == 3, "coef has shape ", coef.sizes(),
              "; accepted is [", batch_, ", 3].");
  check_accumulate(coef, "coef");
}

void AdvflowOperands::check_column(const at::Tensor& column, const char* name) const {
  TORCH_CHECK(column.dim() == 0 || (column.dim() == 1 && column.size(0) == batch_), name, " has shape ", column.sizes(),
              "; accepted are [] and [", batch_, "].");
  check_accumulate(column, name);
}

void AdvflowOperands::check_accumulate(const at::Tensor& tensor, const char* name) const {
  TORCH_CHECK(tensor.scalar_type() == accumulate_, name, " has dtype ", tensor.scalar_type(),
              "; accepted is the accumulate type of the inputs, ", accumulate_, ".");
  check_device(tensor, name);
}

void AdvflowOperands::check_device(const at::Tensor& tensor, const char* name) const {
  TORCH_CHECK(tensor.device() == like_.device(), name, " is on ", tensor.device(), "; accepted is the device of v, ",
              like_.device(), ".");
}

void advflow_check_reduction(c10::string_view reduction) {
  TORCH_CHECK(reduction == "mean" || reduction == "sum" || reduction == "none", "reduction is '", reduction,
              "'; accepted are 'mean', 'sum' and 'none'.");
}

double advflow_largest_gradient(const at::Tensor& v, at::ScalarType accumulate) {
  const int64_t elements = v.size(0) ? v.numel() / v.size(0) : 0;
  double largest = std::numeric_limits<double>::max();
  if (v.scalar_type() == at::kHalf) largest = double(std::numeric_limits<c10::Half>::max());
  if (v.scalar_type() == at::kBFloat16) largest = double(std::numeric_limits<c10::BFloat16>::max());
  if (v.scalar_type() == at::kFloat) largest = double(std::numeric_limits<float>::max());
  const double sum =
      accumulate == at::kDouble ? std::numeric_limits<double>::max() : double(std::numeric_limits<float>::max());
  const double root = std::sqrt(double(std::max<int64_t>(elements, 1)));
  return std::min(largest / 2 * root, sum / root);
}

// ---------------------------------------------------------------------------
// Reading

namespace {

bool is_dense(const at::Tensor& tensor, int64_t first_dimension) {
  int64_t expected = 1;
  for (int64_t dimension = tensor.dim() - 1; dimension >= first_dimension; --dimension) {
    if (tensor.size(dimension) == 1) continue;
    if (tensor.stride(dimension) != expected) return false;
    expected *= tensor.size(dimension);
  }
  return true;
}

// What torch.frombuffer returns may begin anywhere.
bool begins_on_an_element(const at::Tensor& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % tensor.element_size() == 0;
}

}  // namespace

const at::Tensor& AdvflowReader::keep(at::Tensor tensor) {
  copies_.push_back(std::move(tensor));
  return copies_.back();
}

AdvflowTensor AdvflowReader::rows(const at::Tensor& tensor) {
  const bool as_it_is = is_dense(tensor, 1) && begins_on_an_element(tensor);
  const at::Tensor& read = as_it_is ? tensor : keep(tensor.clone(at::MemoryFormat::Contiguous));
  // The stride of a single row may be anything, and would only spoil the alignment.
  const int64_t row_stride = read.size(0) > 1 ? read.stride(0) : 0;
  return {read.const_data_ptr(), row_stride, advflow_dtype_code(read.scalar_type(), "a tensor")};
}

AdvflowTensor AdvflowReader::rows(const std::optional<at::Tensor>& tensor) {
  if (!tensor.has_value() || !tensor->defined()) return {nullptr, 0, ADVFLOW_FLOAT32};
  return rows(*tensor);
}

AdvflowColumn AdvflowReader::column(const at::Tensor& tensor) {
  const at::Tensor& read = begins_on_an_element(tensor) ? tensor : keep(tensor.clone());
  return {read.const_data_ptr(), read.dim() ? read.stride(0) : 0};
}

AdvflowColumn AdvflowReader::kept_column(at::Tensor tensor) { return column(keep(std::move(tensor))); }

const void* AdvflowReader::contiguous(const at::Tensor& tensor) {
  const bool as_it_is = tensor.is_contiguous() && begins_on_an_element(tensor);
  return (as_it_is ? tensor : keep(tensor.clone(at::MemoryFormat::Contiguous))).const_data_ptr();
}

// ---------------------------------------------------------------------------
// Launching

void advflow_check_status(int status, const char* op) {
  TORCH_CHECK(status != ADVFLOW_UNSUPPORTED_DTYPE, op, " received a dtype that has no kernel.");
  TORCH_CHECK(status == ADVFLOW_OK, op, " failed to launch with CUDA error ", -status, ".");
}

namespace {

void run_parallel(int64_t count, void (*body)(void*, int64_t, int64_t), void* context) {
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) { body(context, begin, end); });
}

const AdvflowParallelFor torch_threads = {run_parallel};

}  // namespace

void* advflow_torch_threads(const at::Tensor&) { return const_cast<AdvflowParallelFor*>(&torch_threads); }
