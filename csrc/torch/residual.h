// The operators of csrc/torch/residual.cpp, registered in registry.cpp.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

at::Tensor residual_stats_cpu(const at::Tensor& v, const at::Tensor& target, const std::optional<at::Tensor>& noise,
                              const std::optional<at::Tensor>& v_old, const std::optional<at::Tensor>& v_ref,
                              double mix, const std::optional<at::Tensor>& mixes);
at::Tensor residual_grad_cpu(const at::Tensor& v, const at::Tensor& target, const std::optional<at::Tensor>& noise,
                             const std::optional<at::Tensor>& v_old, const std::optional<at::Tensor>& v_ref,
                             const at::Tensor& coef, const std::optional<at::Tensor>& upstream);
at::Tensor transition_stats_cpu(const at::Tensor& v, const at::Tensor& eps, const at::Tensor& v_old,
                                const std::optional<at::Tensor>& v_ref);
at::Tensor transition_grad_cpu(const at::Tensor& v, const at::Tensor& eps, const at::Tensor& v_old,
                               const std::optional<at::Tensor>& v_ref, const at::Tensor& coef,
                               const std::optional<at::Tensor>& upstream);

at::Tensor residual_stats_cuda(const at::Tensor& v, const at::Tensor& target, const std::optional<at::Tensor>& noise,
                               const std::optional<at::Tensor>& v_old, const std::optional<at::Tensor>& v_ref,
                               double mix, const std::optional<at::Tensor>& mixes);
at::Tensor residual_grad_cuda(const at::Tensor& v, const at::Tensor& target, const std::optional<at::Tensor>& noise,
                              const std::optional<at::Tensor>& v_old, const std::optional<at::Tensor>& v_ref,
                              const at::Tensor& coef, const std::optional<at::Tensor>& upstream);
at::Tensor transition_stats_cuda(const at::Tensor& v, const at::Tensor& eps, const at::Tensor& v_old,
                                 const std::optional<at::Tensor>& v_ref);
at::Tensor transition_grad_cuda(const at::Tensor& v, const at::Tensor& eps, const at::Tensor& v_old,
                                const std::optional<at::Tensor>& v_ref, const at::Tensor& coef,
                                const std::optional<at::Tensor>& upstream);
