// Checks, allocation and the call of a launcher: the only file that sees both
// torch tensors and the kernels of a sampler step.
#include "sde_step.h"

#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>

#include "launchers.h"
#include "operands.h"
#include "stream.h"

namespace {

using OptionalTensor = std::optional<at::Tensor>;
using Step = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
using WorkspaceSize = int64_t (*)(int64_t, int64_t);
using Launcher = int (*)(const AdvflowSdeStepInputs*, void*, void*, void*, void*, void*);

void check_seed(const at::Tensor& seed, const AdvflowOperands& operands) {
  TORCH_CHECK(seed.dim() == 1 && seed.size(0) == operands.batch(), "seed has shape ", seed.sizes(), "; accepted is [",
              operands.batch(), "].");
  TORCH_CHECK(seed.scalar_type() == at::kLong, "seed has dtype ", seed.scalar_type(), "; accepted is int64.");
  operands.check_device(seed, "seed");
}

Step run(const at::Tensor& v, const at::Tensor& x, const at::Tensor& coef, const OptionalTensor& noise,
         const OptionalTensor& seed, std::optional<at::ScalarType> dtype, WorkspaceSize size, Launcher launch,
         void* where) {
  TORCH_CHECK(noise.has_value() != seed.has_value(), noise.has_value() ? "Both" : "Neither",
              " of noise and seed given; accepted is exactly one of them.");
  AdvflowOperands operands(v);
  AdvflowSdeStepInputs in;
  in.v = operands.hold(v, "v");
  in.x = operands.hold(x, "x");
  in.noise = operands.hold(noise, "noise");
  in.dtype = advflow_dtype_code(dtype.value_or(x.scalar_type()), "dtype", " is ");
  operands.accumulate_in(in.dtype);
  operands.check_coef(coef);
  const at::Tensor rows = coef.contiguous();
  in.coef = rows.const_data_ptr();
  at::Tensor seeds;
  in.seeds = nullptr;
  if (seed.has_value()) {
    check_seed(*seed, operands);
    seeds = seed->contiguous();
    in.seeds = seeds.const_data_ptr<int64_t>();
  }
  in.batch = operands.batch();
  in.elements = operands.elements();

  const auto options = x.options().dtype(dtype.value_or(x.scalar_type()));
  const at::Tensor x_next = at::empty(x.sizes(), options);
  const at::Tensor eps = at::empty(x.sizes(), options);
  if (operands.empty()) return {x_next, eps, at::zeros({in.batch}, operands.accumulate_options())};
  const at::Tensor eps_sq = at::empty({in.batch}, operands.accumulate_options());
  const at::Tensor workspace = at::empty({size(in.batch, in.elements)}, x.options().dtype(at::kByte));
  ++advflow_launches;
  advflow_check_status(launch(&in, workspace.mutable_data_ptr(), x_next.mutable_data_ptr(), eps.mutable_data_ptr(),
                              eps_sq.mutable_data_ptr(), where),
                       "sde_step");
  return {x_next, eps, eps_sq};
}

}  // namespace

Step sde_step_cpu(const at::Tensor& v, const at::Tensor& x, const at::Tensor& coef, const OptionalTensor& noise,
                  const OptionalTensor& seed, std::optional<at::ScalarType> dtype) {
  return run(v, x, coef, noise, seed, dtype, advflow_sde_step_workspace_cpu, advflow_sde_step_cpu,
             advflow_torch_threads());
}

#ifdef ADVFLOW_WITH_CUDA
Step sde_step_cuda(const at::Tensor& v, const at::Tensor& x, const at::Tensor& coef, const OptionalTensor& noise,
                   const OptionalTensor& seed, std::optional<at::ScalarType> dtype) {
  const c10::DeviceGuard guard(v.device());
  return run(v, x, coef, noise, seed, dtype, advflow_sde_step_workspace_cuda, advflow_sde_step_cuda,
             advflow_current_stream(v));
}
#endif
