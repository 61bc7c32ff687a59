// Checks, allocation and the call of a launcher: the only file that sees both
// torch tensors and the kernels of the loss core.
#include "residual.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>

#include "latents.h"
#include "launchers.h"
#include "math/residual.h"
#include "operands.h"
#include "stream.h"

namespace {

using OptionalTensor = std::optional<at::Tensor>;

struct Device {
  int64_t (*workspace)(int64_t, int64_t);
  int (*stats)(const AdvflowResidualInputs*, void*, void*, void*);
  int (*grad)(const AdvflowResidualInputs*, const void*, const AdvflowColumn*, void*, void*);
  void* (*where)(const at::Tensor&);
};

const Device cpu = {advflow_residual_stats_workspace_cpu, advflow_residual_stats_cpu, advflow_residual_grad_cpu,
                    advflow_torch_threads};
#ifdef ADVFLOW_WITH_CUDA
const Device cuda = {advflow_residual_stats_workspace_cuda, advflow_residual_stats_cuda, advflow_residual_grad_cuda,
                     advflow_current_stream};
#endif

at::Tensor run_stats(const AdvflowLatents& latents, double mix, const OptionalTensor& mixes, const Device& device) {
  const char* op = latents.are_transitions ? "transition_stats" : "residual_stats";
  const AdvflowOperands& operands = latents.operands;
  const bool has_mixes = mixes.has_value() && mixes->defined();
  if (has_mixes) operands.check_column(*mixes, "mixes");
  operands.check_served(op);

  const c10::OptionalDeviceGuard guard(latents.v.device());
  const auto shape = {operands.batch(), int64_t(ADVFLOW_RESIDUAL_STATS)};
  if (operands.empty()) return at::zeros(shape, operands.accumulate_options());
  AdvflowReader reader;
  AdvflowResidualInputs in = latents.read(reader);
  in.mix = mix;
  if (has_mixes) in.mixes = reader.column(*mixes);
  const at::Tensor stats = at::empty(shape, operands.accumulate_options());
  const at::Tensor workspace = at::empty({device.workspace(in.batch, in.elements)}, stats.options().dtype(at::kByte));
  ++advflow_launches;
  advflow_check_status(
      device.stats(&in, workspace.mutable_data_ptr(), stats.mutable_data_ptr(), device.where(latents.v)), op);
  return stats;
}

at::Tensor run_grad(const AdvflowLatents& latents, const at::Tensor& coef, const OptionalTensor& upstream,
                    const Device& device) {
  const char* op = latents.are_transitions ? "transition_grad" : "residual_grad";
  const AdvflowOperands& operands = latents.operands;
  const bool has_upstream = upstream.has_value() && upstream->defined();
  operands.check_coef(coef);
  if (has_upstream) operands.check_column(*upstream, "upstream");
  operands.check_served(op);

  const c10::OptionalDeviceGuard guard(latents.v.device());
  const at::Tensor grad = at::empty(latents.v.sizes(), latents.v.options());
  if (operands.empty()) return grad;
  AdvflowReader reader;
  const AdvflowResidualInputs in = latents.read(reader);
  const AdvflowColumn weights = has_upstream ? reader.column(*upstream) : AdvflowColumn{nullptr, 0};
  ++advflow_launches;
  advflow_check_status(
      device.grad(&in, reader.contiguous(coef), &weights, grad.mutable_data_ptr(), device.where(latents.v)), op);
  return grad;
}

}  // namespace

at::Tensor residual_stats_cpu(const at::Tensor& v, const at::Tensor& target, const OptionalTensor& noise,
                              const OptionalTensor& v_old, const OptionalTensor& v_ref, double mix,
                              const OptionalTensor& mixes) {
  return run_stats(AdvflowLatents::of_samples(v, target, noise, v_old, v_ref), mix, mixes, cpu);
}

at::Tensor residual_grad_cpu(const at::Tensor& v, const at::Tensor& target, const OptionalTensor& noise,
                             const OptionalTensor& v_old, const OptionalTensor& v_ref, const at::Tensor& coef,
                             const OptionalTensor& upstream) {
  return run_grad(AdvflowLatents::of_samples(v, target, noise, v_old, v_ref), coef, upstream, cpu);
}

at::Tensor transition_stats_cpu(const at::Tensor& v, const at::Tensor& eps, const at::Tensor& v_old,
                                const OptionalTensor& v_ref) {
  return run_stats(AdvflowLatents::of_transitions(v, eps, v_old, v_ref), 0.0, std::nullopt, cpu);
}

at::Tensor transition_grad_cpu(const at::Tensor& v, const at::Tensor& eps, const at::Tensor& v_old,
                               const OptionalTensor& v_ref, const at::Tensor& coef, const OptionalTensor& upstream) {
  return run_grad(AdvflowLatents::of_transitions(v, eps, v_old, v_ref), coef, upstream, cpu);
}

#ifdef ADVFLOW_WITH_CUDA
at::Tensor residual_stats_cuda(const at::Tensor& v, const at::Tensor& target, const OptionalTensor& noise,
                               const OptionalTensor& v_old, const OptionalTensor& v_ref, double mix,
                               const OptionalTensor& mixes) {
  return run_stats(AdvflowLatents::of_samples(v, target, noise, v_old, v_ref), mix, mixes, cuda);
}

at::Tensor residual_grad_cuda(const at::Tensor& v, const at::Tensor& target, const OptionalTensor& noise,
                              const OptionalTensor& v_old, const OptionalTensor& v_ref, const at::Tensor& coef,
                              const OptionalTensor& upstream) {
  return run_grad(AdvflowLatents::of_samples(v, target, noise, v_old, v_ref), coef, upstream, cuda);
}

at::Tensor transition_stats_cuda(const at::Tensor& v, const at::Tensor& eps, const at::Tensor& v_old,
                                 const OptionalTensor& v_ref) {
  return run_stats(AdvflowLatents::of_transitions(v, eps, v_old, v_ref), 0.0, std::nullopt, cuda);
}

at::Tensor transition_grad_cuda(const at::Tensor& v, const at::Tensor& eps, const at::Tensor& v_old,
                                const OptionalTensor& v_ref, const at::Tensor& coef, const OptionalTensor& upstream) {
  return run_grad(AdvflowLatents::of_transitions(v, eps, v_old, v_ref), coef, upstream, cuda);
}
#endif
