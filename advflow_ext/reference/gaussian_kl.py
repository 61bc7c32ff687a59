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
    dtype = accumulate_dtype(mean1, mean2)
    offset = torch.log(sigma2 / sigma1) + sigma1.square() / (2 * sigma2.square()) - 0.5
    return _scaled_distance(mean1, mean2, (0.5 / sigma2.square()).to(dtype), offset.to(dtype))


def gaussian_kl_from_velocity(v: Tensor, v_old: Tensor, table: StepTable, index: Tensor) -> Tensor:
    """Same arguments, result and errors as :func:`advflow_ext.gaussian_kl_from_velocity`, by PyTorch autograd."""
    kappa = velocity_kl_arguments(v, v_old, table, index)
    return _scaled_distance(v, v_old.detach(), kappa.square() / 2, torch.zeros_like(kappa))


def _scaled_distance(first: Tensor, second: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    difference = first.flatten(1).to(scale.dtype) - second.flatten(1).to(scale.dtype)
    values = offset + scale * mean(difference.detach().square())
    finite = torch.isfinite(values)
    # The mask sits at the entrance: the backward of `where` writes exact zeros there, whatever is infinite behind it.
    difference = torch.where(finite[:, None], difference, 0)
    kl = offset + scale * mean(difference.square())
    return torch.where(finite, kl, values)
