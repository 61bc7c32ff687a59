"""KL divergence of isotropic Gaussians (arXiv 2606.11025 eq. 14, 20) in plain differentiable PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from advflow_ext.ops._checks import accumulate_dtype
from advflow_ext.ops._transition_checks import gaussian_kl_arguments, velocity_kl_arguments
from advflow_ext.ops.step_table import StepTable
from advflow_ext.reference._forward import mean


def gaussian_kl(mean1: Tensor, mean2: Tensor, std1: float | Tensor, std2: float | Tensor | None = None) -> Tensor:
    """Same arguments, result and errors as :func:`advflow_ext.gaussian_kl`, by PyTorch autograd."""
    sigma1, sigma2 = gaussian_kl_arguments(mean1, mean2, std1, std2)
    return scaled_distance(mean1, mean2, sigma2, kl_of_spreads(sigma1, sigma2), accumulate_dtype(mean1, mean2))


def gaussian_kl_from_velocity(v: Tensor, v_old: Tensor, table: StepTable, index: Tensor) -> Tensor:
    """Same arguments, result and errors as :func:`advflow_ext.gaussian_kl_from_velocity`, by PyTorch autograd."""
    kappa = velocity_kl_arguments(v, v_old, table, index)
    std = kappa.double().abs().reciprocal()
    return scaled_distance(v, v_old.detach(), std, torch.zeros_like(std), kappa.dtype)


def kl_of_spreads(std1: Tensor, std2: Tensor) -> Tensor:
    """ln(std2 / std1) + std1^2 / (2 std2^2) - 1/2 of float64 ``[N]``, to full precision where the two nearly agree."""
    gap = (std1 - std2) / std2
    near = gap - gap.log1p() + gap.square() / 2
    return torch.where(gap.abs() < 0.1, near, std2.log() - std1.log() + (std1 / std2).square() / 2 - 0.5)


def scaled_distance(first: Tensor, second: Tensor, std: Tensor, offset: Tensor, dtype: torch.dtype) -> Tensor:
    """offset + <((first - second) / std)^2> / 2 in ``dtype``, with a gradient to both; ``std``, ``offset`` float64.

    In float64, and divided before it is squared: float32 holds neither the square of 1e-20 nor one over it.
    """
    difference = first.flatten(1).double() - second.flatten(1).double()
    distance = difference.detach() / std[:, None]
    values = (offset + mean(distance.square()) / 2).to(dtype)
    slope = distance.abs() / (std[:, None] * max(distance.shape[1], 1))
    finite = torch.isfinite(values) & (slope <= torch.finfo(dtype).max).all(1)
    # The mask sits at the entrance: the backward of `where` writes exact zeros there, whatever is infinite behind it.
    difference = torch.where(finite[:, None], difference, 0)
    kl = (offset + mean((difference / std[:, None]).square()) / 2).to(dtype)
    return torch.where(finite, kl, values)
