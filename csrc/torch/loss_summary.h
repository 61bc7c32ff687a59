// The operator of csrc/torch/loss_summary.cpp, registered in registry.cpp.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/string_view.h>

#include <optional>
#include <tuple>

std::tuple<at::Tensor, at::Tensor, at::Tensor> loss_summary_cpu(
    at::TensorList means, at::TensorList required, const at::Tensor& advantages, const at::Tensor& extreme,
    const at::Tensor& stats, const at::Tensor& coef, const at::Tensor& valid, const at::Tensor& flagged,
    int64_t stat_means, bool largest, c10::string_view reduction, const std::optional<at::Tensor>& log_ratio,
    const std::optional<at::Tensor>& log_lowest, const std::optional<at::Tensor>& log_highest,
    const std::optional<at::Tensor>& v, bool contrast);
std::tuple<at::Tensor, at::Tensor, at::Tensor> loss_summary_cuda(
    at::TensorList means, at::TensorList required, const at::Tensor& advantages, const at::Tensor& extreme,
    const at::Tensor& stats, const at::Tensor& coef, const at::Tensor& valid, const at::Tensor& flagged,
    int64_t stat_means, bool largest, c10::string_view reduction, const std::optional<at::Tensor>& log_ratio,
    const std::optional<at::Tensor>& log_lowest, const std::optional<at::Tensor>& log_highest,
    const std::optional<at::Tensor>& v, bool contrast);
