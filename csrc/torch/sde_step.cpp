// Checks, allocation and the call of a launcher: the only file that sees both
// torch tensors and the kernels of a sampler step.
#include "sde_step.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>

#include "launchers.h"
#include "operands.h"
#include "stream.h"

namespace {

using OptionalTensor = std::optional<at::Tensor>;
using Step = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

struct Device {
  int64_t (*workspace)(int64_t, int64_t);
  int (*step)(const AdvflowSdeStepInputs*, void*, void*, void*, void*, void*);
  int (*deviation_sq)(const AdvflowTransitionInputs*, void*, void*, void*);
  int (*eps)(const AdvflowTransitionInputs*, void*, void*);
  void* (*where)(const at::Tensor&);
};

const Device cpu = {advflow_sde_step_workspace_cpu, advflow_sde_step_cpu, advflow_transition_deviation_sq_cpu,
                    advflow_transition_deviation_cpu, advflow_torch_threads};
#ifdef ADVFLOW_WITH_CUDA
const Device cuda = {advflow_sde_step_workspace_cuda, advflow_sde_step_cuda, advflow_transition_deviation_sq_cuda,
                     advflow_transition_deviation_cuda, advflow_current_stream};
#endif

void check_seed(const at::Tensor& seed, const AdvflowOperands& operands) {
  TORCH_CHECK(seed.dim() == 1 && seed.size(0) == operands.batch(), "seed has shape ", seed.sizes(), "; accepted is [",
              operands.batch(), "].");
  TORCH_CHECK(seed.scalar_type() == at::kLong, "seed has dtype ", seed.scalar_type(), "; accepted is int64.");
  operands.check_device(seed, "seed");
}

Step run(const at::Tensor& v, const at::Tensor& x, const at::Tensor& coef, const OptionalTensor& noise,
         const OptionalTensor& seed, std::optional<at::ScalarType> dtype, const Device& device) {
  const bool drawn = seed.has_value() && seed->defined();
  const bool given = noise.has_value() && noise->defined();
  AdvflowOperands operands(v);
  operands.check(x, "x");
  TORCH_CHECK(given != drawn, given ? "Both" : "Neither", " of noise and seed given; accepted is exactly one of them.");
  operands.check_if_given(noise, "noise");
  if (drawn) check_seed(*seed, operands);
  const at::ScalarType stored = dtype.value_or(x.scalar_type());
  const AdvflowDtype stored_code = advflow_dtype_code(stored, "dtype", " is ");
  operands.accumulate_in(stored_code);
  operands.check_coef(coef);
  operands.check_served("sde_step");

  const c10::OptionalDeviceGuard guard(v.device());
  const at::Tensor x_next = at::empty(x.sizes(), x.options().dtype(stored));
  const at::Tensor eps = at::empty(x.sizes(), operands.accumulate_options());
  const auto sums = operands.accumulate_options().dtype(at::kDouble);
  if (operands.empty()) return {x_next, eps, at::zeros({operands.batch()}, sums)};
  const at::Tensor deviation_sq = at::empty({operands.batch()}, sums);
  AdvflowReader reader;
  AdvflowSdeStepInputs in = {};
  in.v = reader.rows(v);
  in.x = reader.rows(x);
  in.noise = reader.rows(noise);
  in.seeds = drawn ? static_cast<const int64_t*>(reader.contiguous(*seed)) : nullptr;
  in.coef = reader.contiguous(coef);
  in.batch = operands.batch();
  in.elements = operands.elements();
  in.dtype = stored_code;
  const at::Tensor workspace = at::empty({device.workspace(in.batch, in.elements)}, x.options().dtype(at::kByte));
  ++advflow_launches;
  advflow_check_status(device.step(&in, workspace.mutable_data_ptr(), x_next.mutable_data_ptr(), eps.mutable_data_ptr(),
                                   deviation_sq.mutable_data_ptr(), device.where(v)),
                       "sde_step");
  return {x_next, eps, deviation_sq};
}

AdvflowTransitionInputs read(AdvflowReader& reader, const AdvflowOperands& operands, const at::Tensor& v,
                             const at::Tensor& x, const at::Tensor& x_next, const at::Tensor& coef) {
  AdvflowTransitionInputs in = {};
  in.v = reader.rows(v);
  in.x = reader.rows(x);
  in.x_next = reader.rows(x_next);
  in.coef = reader.contiguous(coef);
  in.batch = operands.batch();
  in.elements = operands.elements();
  return in;
}

at::Tensor run_eps_sq(const at::Tensor& v, const at::Tensor& x, const at::Tensor& x_next, const at::Tensor& coef,
                      const Device& device) {
  AdvflowOperands operands(v);
  operands.check(x, "x");
  operands.check(x_next, "x_next");
  operands.check_coef(coef);
  operands.check_served("transition_deviation_sq");

  const c10::OptionalDeviceGuard guard(v.device());
  const auto sums = operands.accumulate_options().dtype(at::kDouble);
  if (operands.empty()) return at::zeros({operands.batch()}, sums);
  const at::Tensor deviation_sq = at::empty({operands.batch()}, sums);
  AdvflowReader reader;
  const AdvflowTransitionInputs in = read(reader, operands, v, x, x_next, coef);
  const at::Tensor workspace = at::empty({device.workspace(in.batch, in.elements)}, x.options().dtype(at::kByte));
  ++advflow_launches;
  advflow_check_status(
      device.deviation_sq(&in, workspace.mutable_data_ptr(), deviation_sq.mutable_data_ptr(), device.where(v)),
      "transition_deviation_sq");
  return deviation_sq;
}

at::Tensor run_eps(const at::Tensor& v, const at::Tensor& x, const at::Tensor& x_next, const at::Tensor& coef,
                   const OptionalTensor& weight, std::optional<at::ScalarType> dtype, const Device& device) {
  const bool weighted = weight.has_value() && weight->defined();
  AdvflowOperands operands(v);
  operands.check(x, "x");
  operands.check(x_next, "x_next");
  const at::ScalarType written = dtype.value_or(operands.accumulate_options().dtype().toScalarType());
  const AdvflowDtype written_code = advflow_dtype_code(written, "dtype", " is ");
  operands.accumulate_in(written_code);
  operands.check_coef(coef);
  if (weighted) operands.check_column(*weight, "weight");
  operands.check_served("transition_deviation");

  const c10::OptionalDeviceGuard guard(v.device());
  const at::Tensor eps = at::empty(x.sizes(), x.options().dtype(written));
  if (operands.empty()) return eps;
  AdvflowReader reader;
  AdvflowTransitionInputs in = read(reader, operands, v, x, x_next, coef);
  if (weighted) in.weight = reader.column(*weight);
  in.dtype = written_code;
  ++advflow_launches;
  advflow_check_status(device.eps(&in, eps.mutable_data_ptr(), device.where(v)), "transition_deviation");
  return eps;
}

}  // namespace

Step sde_step_cpu(const at::Tensor& v, const at::Tensor& x, const at::Tensor& coef, const OptionalTensor& noise,
                  const OptionalTensor& seed, std::optional<at::ScalarType> dtype) {
  return run(v, x, coef, noise, seed, dtype, cpu);
}

at::Tensor transition_deviation_sq_cpu(const at::Tensor& v, const at::Tensor& x, const at::Tensor& x_next,
                                       const at::Tensor& coef) {
  return run_eps_sq(v, x, x_next, coef, cpu);
}

at::Tensor transition_deviation_cpu(const at::Tensor& v, const at::Tensor& x, const at::Tensor& x_next,
                                    const at::Tensor& coef, const OptionalTensor& weight,
                                    std::optional<at::ScalarType> dtype) {
  return run_eps(v, x, x_next, coef, weight, dtype, cpu);
}

#ifdef ADVFLOW_WITH_CUDA
Step sde_step_cuda(const at::Tensor& v, const at::Tensor& x, const at::Tensor& coef, const OptionalTensor& noise,
                   const OptionalTensor& seed, std::optional<at::ScalarType> dtype) {
  return run(v, x, coef, noise, seed, dtype, cuda);
}

at::Tensor transition_deviation_sq_cuda(const at::Tensor& v, const at::Tensor& x, const at::Tensor& x_next,
                                        const at::Tensor& coef) {
  return run_eps_sq(v, x, x_next, coef, cuda);
}

at::Tensor transition_deviation_cuda(const at::Tensor& v, const at::Tensor& x, const at::Tensor& x_next,
                                     const at::Tensor& coef, const OptionalTensor& weight,
                                     std::optional<at::ScalarType> dtype) {
  return run_eps(v, x, x_next, coef, weight, dtype, cuda);
}
#endif
