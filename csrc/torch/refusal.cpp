#include "refusal.h"

#include <ATen/core/dispatch/Dispatcher.h>

#include <string>

namespace {

#ifdef ADVFLOW_WITH_CUDA
constexpr const char* kDevices = "cpu and cuda";
#else
constexpr const char* kDevices = "cpu, all that this build has kernels for";
#endif

bool is_served(at::Device device) {
#ifdef ADVFLOW_WITH_CUDA
  if (device.is_cuda()) return true;
#endif
  return device.is_cpu();
}

void check(const at::Tensor& tensor, const std::string& name) {
  if (!tensor.defined()) return;
  TORCH_CHECK(!tensor.is_nested(), name, " is a nested tensor; accepted is one of strided layout.");
  TORCH_CHECK(tensor.layout() == at::kStrided, name, " has layout ", tensor.layout(), "; accepted is Strided.");
  TORCH_CHECK(!tensor.is_quantized(), name, " has dtype ", tensor.scalar_type(),
              "; accepted are float32, float16, bfloat16 and float64.");
  TORCH_CHECK(is_served(tensor.device()), name, " is on ", tensor.device(), "; accepted are ", kDevices, ".");
}

}  // namespace

void advflow_refuse(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& arguments = op.schema().arguments();
  const auto values = torch::jit::last(*stack, arguments.size());
  for (size_t k = 0; k < arguments.size(); ++k) {
    if (values[k].isTensor()) {
      check(values[k].toTensor(), arguments[k].name());
    } else if (values[k].isTensorList()) {
      const auto tensors = values[k].toTensorVector();
      for (size_t i = 0; i < tensors.size(); ++i)
        check(tensors[i], arguments[k].name() + "[" + std::to_string(i) + "]");
    } else if (values[k].isOptionalTensorList()) {
      const auto tensors = values[k].toOptionalTensorVector();
      for (size_t i = 0; i < tensors.size(); ++i)
        if (tensors[i].has_value()) check(*tensors[i], arguments[k].name() + "[" + std::to_string(i) + "]");
    }
  }
  TORCH_CHECK(false, op.schema().name(), " has no kernel for these tensors; accepted are strided ones on ", kDevices,
              ".");
}
