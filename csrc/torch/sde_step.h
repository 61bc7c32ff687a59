// The operators of csrc/torch/sde_step.cpp, registered in registry.cpp.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

std::tuple<at::Tensor, at::Tensor, at::Tensor> sde_step_cpu(const at::Tensor& v, const at::Tensor& x,
                                                            const at::Tensor& coef,
                                                            const std::optional<at::Tensor>& noise,
                                                            const std::optional<at::Tensor>& seed,
                                                            std::optional<at::ScalarType> dtype);
std::tuple<at::Tensor, at::Tensor, at::Tensor> sde_step_cuda(const at::Tensor& v, const at::Tensor& x,
                                                             const at::Tensor& coef,
                                                             const std::optional<at::Tensor>& noise,
                                                             const std::optional<at::Tensor>& seed,
                                                             std::optional<at::ScalarType> dtype);

at::Tensor transition_deviation_sq_cpu(const at::Tensor& v, const at::Tensor& x, const at::Tensor& x_next,
                                       const at::Tensor& coef);
at::Tensor transition_deviation_cpu(const at::Tensor& v, const at::Tensor& x, const at::Tensor& x_next,
                                    const at::Tensor& coef, const std::optional<at::Tensor>& weight,
                                    std::optional<at::ScalarType> dtype);

at::Tensor transition_deviation_sq_cuda(const at::Tensor& v, const at::Tensor& x, const at::Tensor& x_next,
                                        const at::Tensor& coef);
at::Tensor transition_deviation_cuda(const at::Tensor& v, const at::Tensor& x, const at::Tensor& x_next,
                                     const at::Tensor& coef, const std::optional<at::Tensor>& weight,
                                     std::optional<at::ScalarType> dtype);
