// The gradient of a whole loss, to v alone: its coefficients, handed to residual_grad or transition_grad.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>

#include <array>

#include "loss.h"
#include "residual.h"

namespace {

using OptionalTensor = std::optional<at::Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

template <typename Signature>
c10::TypedOperatorHandle<Signature> operator_named(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

at::Tensor detached(const at::Tensor& tensor) { return tensor.requires_grad() ? tensor.detach() : tensor; }

at::Tensor detached(const OptionalTensor& tensor) {
  return tensor.has_value() && tensor->defined() ? detached(*tensor) : at::Tensor();
}

OptionalTensor if_defined(const at::Tensor& tensor) { return tensor.defined() ? OptionalTensor(tensor) : std::nullopt; }

// A loss and what its gradient is made of. No tensors to autograd, which takes every one it is given for an input.
struct Made {
  at::Tensor loss;
  std::array<at::Tensor, 6> kept;  // v, x0 or eps, noise, v_old, v_ref, coef
  bool transitions;
};

at::Tensor gradient(const variable_list& kept, bool transitions, const at::Tensor& upstream) {
  // Autograd's part in it is to refuse a second derivative, which nobody takes here.
  std::optional<at::AutoDispatchBelowADInplaceOrView> guard;
  if (!at::GradMode::is_enabled()) guard.emplace();
  if (transitions) {
    static const auto op = operator_named<decltype(transition_grad_cpu)>("advflow::transition_grad");
    return op.call(kept[0], kept[1], kept[3], if_defined(kept[4]), kept[5], upstream);
  }
  static const auto op = operator_named<decltype(residual_grad_cpu)>("advflow::residual_grad");
  return op.call(kept[0], kept[1], kept[2], if_defined(kept[3]), if_defined(kept[4]), kept[5], upstream);
}

class LossOfCoefficients : public torch::autograd::Function<LossOfCoefficients> {
 public:
  static constexpr bool is_traceable = true;  // for compiled autograd

  static at::Tensor forward(AutogradContext* context, const at::Tensor& /*v, whose gradient this is*/,
                            const Made& made) {
    // What was made in inference mode has no version to watch, and autograd refuses to keep it; the context may.
    variable_list watched(made.kept.begin(), made.kept.end());
    for (size_t k = 0; k < watched.size(); ++k) {
      if (!watched[k].defined() || !watched[k].is_inference()) continue;
      context->saved_data[std::to_string(k)] = watched[k];
      watched[k] = at::Tensor();
    }
    context->save_for_backward(std::move(watched));
    context->saved_data["transitions"] = made.transitions;
    return made.loss;
  }

  static variable_list backward(AutogradContext* context, const variable_list& upstream) {
    variable_list kept = context->get_saved_variables();
    for (size_t k = 0; k < kept.size(); ++k) {
      const auto unwatched = context->saved_data.find(std::to_string(k));
      if (unwatched != context->saved_data.end()) kept[k] = unwatched->second.toTensor();
    }
    return {gradient(kept, context->saved_data.at("transitions").toBool(), upstream[0]), at::Tensor()};
  }
};

AdvflowLossOutput with_gradient(AdvflowLossOutput output, const at::Tensor& v, const at::Tensor& target,
                                const OptionalTensor& noise, const OptionalTensor& v_old, const OptionalTensor& v_ref,
                                bool transitions) {
  auto& [loss, coef, metrics] = output;
  if (!at::GradMode::is_enabled() || !v.requires_grad()) return output;
  const Made made = {loss, {v, detached(target), detached(noise), detached(v_old), detached(v_ref), coef}, transitions};
  return {LossOfCoefficients::apply(v, made), coef, metrics};
}

template <typename Op, typename... Arguments>
AdvflowLossOutput below_autograd(const Op& op, const Arguments&... arguments) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  return op.call(arguments...);
}

}  // namespace

ADVFLOW_FORWARD_LOSS(autograd) {
  static const auto op = operator_named<decltype(forward_loss_cpu)>("advflow::forward_loss");
  return with_gradient(
      below_autograd(op, name, v, x0, noise, v_old, v_ref, t, advantages, numbers, tensors, choices, reduction), v, x0,
      noise, v_old, v_ref, /*transitions=*/false);
}

ADVFLOW_REVERSE_LOSS(autograd) {
  static const auto op = operator_named<decltype(reverse_loss_cpu)>("advflow::reverse_loss");
  return with_gradient(
      below_autograd(op, name, v, eps, v_old, v_ref, index, steps, advantages, numbers, tensors, choices, reduction), v,
      eps, std::nullopt, v_old, v_ref, /*transitions=*/true);
}
