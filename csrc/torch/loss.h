// The operators of csrc/torch/loss.cpp and their gradient in loss_autograd.cpp, registered in registry.cpp.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <c10/util/string_view.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

using AdvflowLossOutput = std::tuple<at::Tensor, at::Tensor, at::Tensor>;  // loss, coef, metrics

#define ADVFLOW_FORWARD_LOSS(device)                                                                                   \
  AdvflowLossOutput forward_loss_##device(                                                                             \
      c10::string_view name, const at::Tensor& v, const at::Tensor& x0, const at::Tensor& noise,                       \
      const std::optional<at::Tensor>& v_old, const std::optional<at::Tensor>& v_ref, const at::Tensor& t,             \
      const at::Tensor& advantages, at::ArrayRef<double> numbers, const c10::List<std::optional<at::Tensor>>& tensors, \
      at::IntArrayRef choices, c10::string_view reduction)
#define ADVFLOW_REVERSE_LOSS(device)                                                                                   \
  AdvflowLossOutput reverse_loss_##device(                                                                             \
      c10::string_view name, const at::Tensor& v, const at::Tensor& eps, const at::Tensor& v_old,                      \
      const std::optional<at::Tensor>& v_ref, const at::Tensor& index, const at::Tensor& steps,                        \
      const at::Tensor& advantages, at::ArrayRef<double> numbers, const c10::List<std::optional<at::Tensor>>& tensors, \
      at::IntArrayRef choices, c10::string_view reduction)

ADVFLOW_FORWARD_LOSS(cpu);
ADVFLOW_FORWARD_LOSS(cuda);
ADVFLOW_FORWARD_LOSS(autograd);
ADVFLOW_REVERSE_LOSS(cpu);
ADVFLOW_REVERSE_LOSS(cuda);
ADVFLOW_REVERSE_LOSS(autograd);

// What a loss takes and gives, for the fakes in Python.
struct AdvflowLossShape {
  std::string name;
  bool transitions;
  int64_t numbers;
  std::vector<int64_t> choices;  // how many values each has
  int64_t metrics;
};
const std::vector<AdvflowLossShape>& advflow_loss_shapes();  // by AdvflowLoss
