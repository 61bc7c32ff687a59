// Checks, allocation and the call of a launcher: the only file that sees both
// torch tensors and the kernels of the loss core.
#include "residual.h"

#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>

#include "launchers.h"
#include "math/residual.h"
#include "operands.h"
#include "stream.h"

namespace {

using OptionalTensor = std::optional<at::Tensor>;

// The inputs as launchers take them, and the contiguous tensors behind them.
struct Inputs {
  Inputs(const at::Tensor& v, const at::Tensor& target, const OptionalTensor& noise, const OptionalTensor& v_old,
         const OptionalTensor& v_ref, double mix = 0.0)
      : operands(v) {
    raw.v = operands.hold(v, "v");
    raw.target = operands.hold(target, "target");
    raw.noise = operands.hold(noise, "noise");
    raw.v_old = operands.hold(v_old, "v_old");
    raw.v_ref = operands.hold(v_ref, "v_ref");
    raw.batch = operands.batch();
    raw.elements = operands.elements();
    raw.mix = mix;
    raw.target_is = raw.noise.data ? ADVFLOW_TARGET_X0 : ADVFLOW_TARGET_U;
  }

  static Inputs of_transitions(const at::Tensor& v, const at::Tensor& eps, const at::Tensor& v_old,
                               const OptionalTensor& v_ref) {
    Inputs in(v, eps, {}, v_old, v_ref);
    in.raw.target_is = ADVFLOW_TARGET_EPS;
    return in;
  }

  bool are_transitions() const { return raw.target_is == ADVFLOW_TARGET_EPS; }

  AdvflowOperands operands;
  AdvflowResidualInputs raw;
};

using WorkspaceSize = int64_t (*)(int64_t, int64_t);
using StatsLauncher = int (*)(const AdvflowResidualInputs*, void*, void*, void*);
using GradLauncher = int (*)(const AdvflowResidualInputs*, const void*, const AdvflowColumn*, void*, void*);

at::Tensor run_stats(const Inputs& in, WorkspaceSize size, StatsLauncher launch, void* where) {
  const auto shape = {in.raw.batch, int64_t(ADVFLOW_RESIDUAL_STATS)};
  if (in.operands.empty()) return at::zeros(shape, in.operands.accumulate_options());
  const at::Tensor stats = at::empty(shape, in.operands.accumulate_options());
  const at::Tensor workspace = at::empty({size(in.raw.batch, in.raw.elements)}, stats.options().dtype(at::kByte));
  ++advflow_launches;
  advflow_check_status(launch(&in.raw, workspace.mutable_data_ptr(), stats.mutable_data_ptr(), where),
                       in.are_transitions() ? "transition_stats" : "residual_stats");
  return stats;
}

// One number for all rows, or one a row.
AdvflowColumn upstream_column(const OptionalTensor& upstream, const AdvflowOperands& operands) {
  if (!upstream.has_value()) return {nullptr, 0};
  operands.check_upstream(*upstream);
  return {upstream->const_data_ptr(), upstream->dim() ? upstream->stride(0) : 0};
}

at::Tensor run_grad(const Inputs& in, const at::Tensor& v, const at::Tensor& coef, const OptionalTensor& upstream,
                    GradLauncher launch, void* where) {
  in.operands.check_coef(coef);
  const AdvflowColumn weights = upstream_column(upstream, in.operands);
  const at::Tensor grad = at::empty(v.sizes(), v.options());
  if (in.operands.empty()) return grad;
  const at::Tensor rows = coef.contiguous();
  ++advflow_launches;
  advflow_check_status(launch(&in.raw, rows.const_data_ptr(), &weights, grad.mutable_data_ptr(), where),
                       in.are_transitions() ? "transition_grad" : "residual_grad");
  return grad;
}

at::Tensor stats_cpu(const Inputs& in) {
  return run_stats(in, advflow_residual_stats_workspace_cpu, advflow_residual_stats_cpu, advflow_torch_threads());
}

at::Tensor grad_cpu(const Inputs& in, const at::Tensor& v, const at::Tensor& coef, const OptionalTensor& upstream) {
  return run_grad(in, v, coef, upstream, advflow_residual_grad_cpu, advflow_torch_threads());
}

#ifdef ADVFLOW_WITH_CUDA
at::Tensor stats_cuda(const Inputs& in, const at::Tensor& v) {
  return run_stats(in, advflow_residual_stats_workspace_cuda, advflow_residual_stats_cuda, advflow_current_stream(v));
}

at::Tensor grad_cuda(const Inputs& in, const at::Tensor& v, const at::Tensor& coef, const OptionalTensor& upstream) {
  return run_grad(in, v, coef, upstream, advflow_residual_grad_cuda, advflow_current_stream(v));
}
#endif

}  // namespace

at::Tensor residual_stats_cpu(const at::Tensor& v, const at::Tensor& target, const OptionalTensor& noise,
                              const OptionalTensor& v_old, const OptionalTensor& v_ref, double mix) {
  return stats_cpu(Inputs(v, target, noise, v_old, v_ref, mix));
}

at::Tensor residual_grad_cpu(const at::Tensor& v, const at::Tensor& target, const OptionalTensor& noise,
                             const OptionalTensor& v_old, const OptionalTensor& v_ref, const at::Tensor& coef,
                             const OptionalTensor& upstream) {
  return grad_cpu(Inputs(v, target, noise, v_old, v_ref), v, coef, upstream);
}

at::Tensor transition_stats_cpu(const at::Tensor& v, const at::Tensor& eps, const at::Tensor& v_old,
                                const OptionalTensor& v_ref) {
  return stats_cpu(Inputs::of_transitions(v, eps, v_old, v_ref));
}

at::Tensor transition_grad_cpu(const at::Tensor& v, const at::Tensor& eps, const at::Tensor& v_old,
                               const OptionalTensor& v_ref, const at::Tensor& coef, const OptionalTensor& upstream) {
  return grad_cpu(Inputs::of_transitions(v, eps, v_old, v_ref), v, coef, upstream);
}

#ifdef ADVFLOW_WITH_CUDA
at::Tensor residual_stats_cuda(const at::Tensor& v, const at::Tensor& target, const OptionalTensor& noise,
                               const OptionalTensor& v_old, const OptionalTensor& v_ref, double mix) {
  const c10::DeviceGuard guard(v.device());
  return stats_cuda(Inputs(v, target, noise, v_old, v_ref, mix), v);
}

at::Tensor residual_grad_cuda(const at::Tensor& v, const at::Tensor& target, const OptionalTensor& noise,
                              const OptionalTensor& v_old, const OptionalTensor& v_ref, const at::Tensor& coef,
                              const OptionalTensor& upstream) {
  const c10::DeviceGuard guard(v.device());
  return grad_cuda(Inputs(v, target, noise, v_old, v_ref), v, coef, upstream);
}

at::Tensor transition_stats_cuda(const at::Tensor& v, const at::Tensor& eps, const at::Tensor& v_old,
                                 const OptionalTensor& v_ref) {
  const c10::DeviceGuard guard(v.device());
  return stats_cuda(Inputs::of_transitions(v, eps, v_old, v_ref), v);
}

at::Tensor transition_grad_cuda(const at::Tensor& v, const at::Tensor& eps, const at::Tensor& v_old,
                                const OptionalTensor& v_ref, const at::Tensor& coef, const OptionalTensor& upstream) {
  const c10::DeviceGuard guard(v.device());
  return grad_cuda(Inputs::of_transitions(v, eps, v_old, v_ref), v, coef, upstream);
}
#endif
