// Every schema and every dispatch key of namespace advflow, in one screen.
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include "loss.h"
#include "loss_summary.h"
#include "refusal.h"
#include "residual.h"
#include "sde_step.h"

TORCH_LIBRARY(advflow, m) {
  m.def(
      "residual_stats(Tensor v, Tensor target, Tensor? noise, Tensor? v_old, Tensor? v_ref, "
      "float mix=0.0, Tensor? mixes=None) -> Tensor");
  m.def(
      "residual_grad(Tensor v, Tensor target, Tensor? noise, Tensor? v_old, Tensor? v_ref, Tensor coef, "
      "Tensor? upstream=None) -> Tensor");
  m.def("transition_stats(Tensor v, Tensor eps, Tensor v_old, Tensor? v_ref) -> Tensor");
  m.def(
      "transition_grad(Tensor v, Tensor eps, Tensor v_old, Tensor? v_ref, Tensor coef, Tensor? upstream=None) -> "
      "Tensor");
  m.def(
      "loss_summary(Tensor[] means, Tensor[] required, Tensor advantages, Tensor extreme, Tensor stats, Tensor coef, "
      "Tensor valid, Tensor flagged, int stat_means, bool largest, str reduction, Tensor? log_ratio=None, "
      "Tensor? log_lowest=None, Tensor? log_highest=None, Tensor? v=None, bool contrast=False) -> "
      "(Tensor loss, Tensor masked_coef, Tensor metrics)");
  m.def(
      "forward_loss(str name, Tensor v, Tensor x0, Tensor noise, Tensor? v_old, Tensor? v_ref, Tensor t, "
      "Tensor advantages, float[] numbers, Tensor?[] tensors, int[] choices, str reduction) -> "
      "(Tensor loss, Tensor coef, Tensor metrics)");
  m.def(
      "reverse_loss(str name, Tensor v, Tensor eps, Tensor v_old, Tensor? v_ref, Tensor index, Tensor steps, "
      "Tensor advantages, float[] numbers, Tensor?[] tensors, int[] choices, str reduction) -> "
      "(Tensor loss, Tensor coef, Tensor metrics)");
  m.def(
      "sde_step(Tensor v, Tensor x, Tensor coef, Tensor? noise, Tensor? seed, ScalarType? dtype=None) -> "
      "(Tensor x_next, Tensor eps, Tensor deviation_sq)");
  m.def("transition_deviation_sq(Tensor v, Tensor x, Tensor x_next, Tensor coef) -> Tensor");
  m.def(
      "transition_deviation(Tensor v, Tensor x, Tensor x_next, Tensor coef, Tensor? weight=None, ScalarType? "
      "dtype=None) -> "
      "Tensor");
}

TORCH_LIBRARY_IMPL(advflow, CPU, m) {
  m.impl("residual_stats", residual_stats_cpu);
  m.impl("residual_grad", residual_grad_cpu);
  m.impl("transition_stats", transition_stats_cpu);
  m.impl("transition_grad", transition_grad_cpu);
  m.impl("loss_summary", loss_summary_cpu);
  m.impl("forward_loss", forward_loss_cpu);
  m.impl("reverse_loss", reverse_loss_cpu);
  m.impl("sde_step", sde_step_cpu);
  m.impl("transition_deviation_sq", transition_deviation_sq_cpu);
  m.impl("transition_deviation", transition_deviation_cpu);
}

#ifdef ADVFLOW_WITH_CUDA
TORCH_LIBRARY_IMPL(advflow, CUDA, m) {
  m.impl("residual_stats", residual_stats_cuda);
  m.impl("residual_grad", residual_grad_cuda);
  m.impl("transition_stats", transition_stats_cuda);
  m.impl("transition_grad", transition_grad_cuda);
  m.impl("loss_summary", loss_summary_cuda);
  m.impl("forward_loss", forward_loss_cuda);
  m.impl("reverse_loss", reverse_loss_cuda);
  m.impl("sde_step", sde_step_cuda);
  m.impl("transition_deviation_sq", transition_deviation_sq_cuda);
  m.impl("transition_deviation", transition_deviation_cuda);
}
#endif

// Every other backend and layout: a sentence instead of PyTorch's list of what
// is registered. Nested tensors are not among the composite's.
static void refuse_all(torch::Library& m) {
  for (const char* op :
       {"residual_stats", "residual_grad", "transition_stats", "transition_grad", "loss_summary", "forward_loss",
        "reverse_loss", "sde_step", "transition_deviation_sq", "transition_deviation"}) {
    m.impl(op, torch::CppFunction::makeFromBoxedFunction<&advflow_refuse>());
  }
}

TORCH_LIBRARY_IMPL(advflow, CompositeExplicitAutograd, m) { refuse_all(m); }
TORCH_LIBRARY_IMPL(advflow, NestedTensorCPU, m) { refuse_all(m); }
TORCH_LIBRARY_IMPL(advflow, NestedTensorCUDA, m) { refuse_all(m); }

// A whole loss has its gradient here, what a loss in Python is made of has it there. Without this a raw op under grad,
// and a second derivative, would be silently wrong instead of an error.
TORCH_LIBRARY_IMPL(advflow, Autograd, m) {
  m.impl("forward_loss", forward_loss_autograd);
  m.impl("reverse_loss", reverse_loss_autograd);
  m.impl("residual_stats", torch::autograd::autogradNotImplementedFallback());
  m.impl("residual_grad", torch::autograd::autogradNotImplementedFallback());
  m.impl("transition_stats", torch::autograd::autogradNotImplementedFallback());
  m.impl("loss_summary", torch::autograd::autogradNotImplementedFallback());
  m.impl("transition_grad", torch::autograd::autogradNotImplementedFallback());
  m.impl("sde_step", torch::autograd::autogradNotImplementedFallback());
  m.impl("transition_deviation_sq", torch::autograd::autogradNotImplementedFallback());
  m.impl("transition_deviation", torch::autograd::autogradNotImplementedFallback());
}
