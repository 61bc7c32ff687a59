// Checks, allocation and the call of a launcher: the only file that sees both
// torch tensors and the kernels of the loss core.
#include "residual.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/core/DeviceGuard.h>

#include "launchers.h"
#include "math/residual.h"
#include "stream.h"

std::atomic<int64_t> advflow_launches{0};

namespace {

using OptionalTensor = std::optional<at::Tensor>;

AdvflowDtype dtype_of(const at::Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return ADVFLOW_FLOAT32;
    case at::kDouble:
      return ADVFLOW_FLOAT64;
    case at::kHalf:
      return ADVFLOW_FLOAT16;
    case at::kBFloat16:
      return ADVFLOW_BFLOAT16;
    default:
      TORCH_CHECK(false, name, " has dtype ", tensor.scalar_type(),
                  "; accepted are float32, float16, bfloat16 and float64.");
  }
}

// The inputs as launchers take them, and the contiguous tensors behind them.
class Inputs {
 public:
  Inputs(const at::Tensor& v, const at::Tensor& target, const OptionalTensor& noise, const OptionalTensor& v_old,
         const OptionalTensor& v_ref, double mix = 0.0) {
    TORCH_CHECK(v.dim() >= 1, "v has no dimension; accepted is a batch of samples, [B, ...].");
    like_ = v;
    accumulate_ = at::kFloat;
    raw.v = hold(v, "v");
    raw.target = hold(target, "target");
    raw.noise = hold(noise, "noise");
    raw.v_old = hold(v_old, "v_old");
    raw.v_ref = hold(v_ref, "v_ref");
    raw.batch = v.size(0);
    raw.elements = raw.batch ? v.numel() / raw.batch : 0;
    raw.mix = mix;
    raw.target_is = raw.noise.data ? ADVFLOW_TARGET_X0 : ADVFLOW_TARGET_U;
  }

  static Inputs of_transitions(const at::Tensor& v, const at::Tensor& eps, const at::Tensor& v_old,
                               const OptionalTensor& v_ref) {
    Inputs in(v, eps, {}, v_old, v_ref);
    in.raw.target_is = ADVFLOW_TARGET_EPS;
    return in;
  }

  bool empty() const { return raw.batch == 0 || raw.elements == 0; }
  at::TensorOptions accumulate_options() const { return like_.options().dtype(accumulate_); }

  AdvflowResidualInputs raw;

 private:
  AdvflowTensor hold(const OptionalTensor& tensor, const char* name) {
    if (!tensor.has_value() || !tensor->defined()) return {nullptr, ADVFLOW_FLOAT32};
    TORCH_CHECK(tensor->sizes() == like_.sizes(), name, " has shape ", tensor->sizes(),
                "; accepted is the shape of v, ", like_.sizes(), ".");
    TORCH_CHECK(tensor->device() == like_.device(), name, " is on ", tensor->device(),
                "; accepted is the device of v, ", like_.device(), ".");
    const AdvflowDtype dtype = dtype_of(*tensor, name);
    if (dtype == ADVFLOW_FLOAT64) accumulate_ = at::kDouble;
    held_[count_] = tensor->contiguous();
    return {held_[count_++].const_data_ptr(), dtype};
  }

  at::Tensor like_;
  at::ScalarType accumulate_;
  at::Tensor held_[5];
  int count_ = 0;
};

void check_coef(const at::Tensor& coef, const Inputs& in) {
  const auto options = in.accumulate_options();
  TORCH_CHECK(coef.dim() == 2 && coef.size(0) == in.raw.batch && coef.size(1) == 3, "coef has shape ", coef.sizes(),
              "; accepted is [", in.raw.batch, ", 3].");
  TORCH_CHECK(coef.scalar_type() == options.dtype().toScalarType(), "coef has dtype ", coef.scalar_type(),
              "; accepted is the accumulate type of the inputs, ", options.dtype(), ".");
  TORCH_CHECK(coef.device() == options.device(), "coef is on ", coef.device(), "; accepted is the device of v, ",
              options.device(), ".");
}

void check_status(int status, const char* op) {
  TORCH_CHECK(
      status != ADVFLOW_UNSUPPORTED_DTYPE, op,
      " received float64 on CUDA; accepted there are float32, float16 and bfloat16 (float64 is served on CPU).");
  TORCH_CHECK(status == ADVFLOW_OK, op, " failed to launch with CUDA error ", -status, ".");
}

void run_parallel(int64_t count, void (*body)(void*, int64_t, int64_t), void* context) {
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) { body(context, begin, end); });
}

const AdvflowParallelFor torch_threads = {run_parallel};

void* where_cpu() { return const_cast<AdvflowParallelFor*>(&torch_threads); }

using WorkspaceSize = int64_t (*)(int64_t, int64_t);
using StatsLauncher = int (*)(const AdvflowResidualInputs*, void*, void*, void*);
using GradLauncher = int (*)(const AdvflowResidualInputs*, const void*, void*, void*);

at::Tensor run_stats(const Inputs& in, WorkspaceSize size, StatsLauncher launch, void* where) {
  const auto shape = {in.raw.batch, int64_t(ADVFLOW_RESIDUAL_STATS)};
  if (in.empty()) return at::zeros(shape, in.accumulate_options());
  const at::Tensor stats = at::empty(shape, in.accumulate_options());
  const at::Tensor workspace = at::empty({size(in.raw.batch, in.raw.elements)}, stats.options().dtype(at::kByte));
  ++advflow_launches;
  check_status(launch(&in.raw, workspace.mutable_data_ptr(), stats.mutable_data_ptr(), where), "residual_stats");
  return stats;
}

at::Tensor run_grad(const Inputs& in, const at::Tensor& v, const at::Tensor& coef, GradLauncher launch, void* where) {
  check_coef(coef, in);
  const at::Tensor grad = at::empty(v.sizes(), v.options());
  if (in.empty()) return grad;
  const at::Tensor rows = coef.contiguous();
  ++advflow_launches;
  check_status(launch(&in.raw, rows.const_data_ptr(), grad.mutable_data_ptr(), where), "residual_grad");
  return grad;
}

at::Tensor stats_cpu(const Inputs& in) {
  return run_stats(in, advflow_residual_stats_workspace_cpu, advflow_residual_stats_cpu, where_cpu());
}

at::Tensor grad_cpu(const Inputs& in, const at::Tensor& v, const at::Tensor& coef) {
  return run_grad(in, v, coef, advflow_residual_grad_cpu, where_cpu());
}

#ifdef ADVFLOW_WITH_CUDA
at::Tensor stats_cuda(const Inputs& in, const at::Tensor& v) {
  return run_stats(in, advflow_residual_stats_workspace_cuda, advflow_residual_stats_cuda, advflow_current_stream(v));
}

at::Tensor grad_cuda(const Inputs& in, const at::Tensor& v, const at::Tensor& coef) {
  return run_grad(in, v, coef, advflow_residual_grad_cuda, advflow_current_stream(v));
}
#endif

}  // namespace

at::Tensor residual_stats_cpu(const at::Tensor& v, const at::Tensor& target, const OptionalTensor& noise,
                              const OptionalTensor& v_old, const OptionalTensor& v_ref, double mix) {
  return stats_cpu(Inputs(v, target, noise, v_old, v_ref, mix));
}

at::Tensor residual_grad_cpu(const at::Tensor& v, const at::Tensor& target, const OptionalTensor& noise,
                             const OptionalTensor& v_old, const OptionalTensor& v_ref, const at::Tensor& coef) {
  return grad_cpu(Inputs(v, target, noise, v_old, v_ref), v, coef);
}

at::Tensor transition_stats_cpu(const at::Tensor& v, const at::Tensor& eps, const at::Tensor& v_old,
                                const OptionalTensor& v_ref) {
  return stats_cpu(Inputs::of_transitions(v, eps, v_old, v_ref));
}

at::Tensor transition_grad_cpu(const at::Tensor& v, const at::Tensor& eps, const at::Tensor& v_old,
                               const OptionalTensor& v_ref, const at::Tensor& coef) {
  return grad_cpu(Inputs::of_transitions(v, eps, v_old, v_ref), v, coef);
}

#ifdef ADVFLOW_WITH_CUDA
at::Tensor residual_stats_cuda(const at::Tensor& v, const at::Tensor& target, const OptionalTensor& noise,
                               const OptionalTensor& v_old, const OptionalTensor& v_ref, double mix) {
  const c10::DeviceGuard guard(v.device());
  return stats_cuda(Inputs(v, target, noise, v_old, v_ref, mix), v);
}

at::Tensor residual_grad_cuda(const at::Tensor& v, const at::Tensor& target, const OptionalTensor& noise,
                              const OptionalTensor& v_old, const OptionalTensor& v_ref, const at::Tensor& coef) {
  const c10::DeviceGuard guard(v.device());
  return grad_cuda(Inputs(v, target, noise, v_old, v_ref), v, coef);
}

at::Tensor transition_stats_cuda(const at::Tensor& v, const at::Tensor& eps, const at::Tensor& v_old,
                                 const OptionalTensor& v_ref) {
  const c10::DeviceGuard guard(v.device());
  return stats_cuda(Inputs::of_transitions(v, eps, v_old, v_ref), v);
}

at::Tensor transition_grad_cuda(const at::Tensor& v, const at::Tensor& eps, const at::Tensor& v_old,
                                const OptionalTensor& v_ref, const at::Tensor& coef) {
  const c10::DeviceGuard guard(v.device());
  return grad_cuda(Inputs::of_transitions(v, eps, v_old, v_ref), v, coef);
}
#endif
