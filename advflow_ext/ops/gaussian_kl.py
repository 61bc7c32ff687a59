"""KL divergence of isotropic Gaussians (arXiv 2606.11025 eq. 14, 20) on the native loss core."""

from __future__ import annotations

import torch
from torch import Tensor

from advflow_ext import _native, reference
from advflow_ext._native import STATS
from advflow_ext.contract import checks
from advflow_ext.contract.batches import any_batch
from advflow_ext.contract.numbers import values_are_at_hand
from advflow_ext.contract.step_table import StepTable
from advflow_ext.kernels.residual import residual_loss, residual_stats
from advflow_ext.reference.gaussian_kl import (
    gaussian_kl_arguments,
    kl_of_spreads,
    scaled_distance,
    velocity_kl_arguments,
)

_SQUARE = STATS.index("vu_sq")
# Within these the squares of a difference that matters and of a std, and one over it, are at home in float32.
_LEAST_STD, _LARGEST_STD = 1e-12, 1e12


@any_batch
def gaussian_kl(mean1: Tensor, mean2: Tensor, std1: float | Tensor, std2: float | Tensor | None = None) -> Tensor:
    """KL(N(mean1, std1^2) || N(mean2, std2^2)) of every sample, ``[N]``, averaged over its D elements.

    ::

        ln(std2 / std1) + std1^2 / (2 std2^2) - 1/2 + <(mean1 - mean2)^2> / (2 std2^2)

    Arguments:
        mean1, mean2: ``[N, ...]`` of one shape, any rank from 2, any mix of floating-point dtypes. Both receive a
            gradient, (mean1 - mean2) / (D std2^2) and its negative. Means in half precision have lost the KL of a
            trust region before this is called: see :func:`gaussian_kl_from_velocity`.
        std1, std2: numbers above 0, or tensors of them, ``[N]`` or 0-dimensional; no gradient. Without std2 the two are
            one.

    Result in float32, or float64 as soon as one mean is float64 on CPU. One native launch, and one more for each mean
    that receives a gradient. A sample with NaN or an infinite difference shows it in its value and has zero gradient;
    so has, on CUDA and under torch.compile, one whose std is not above 0, or is outside [1e-12, 1e12] where the means
    differ. On CPU such a std is served in float64.

    Raises ValueError, naming argument, value and what is accepted.
    """
    if not _native.serves(mean1):
        return reference.gaussian_kl(mean1, mean2, std1, std2)
    sigma1, sigma2 = gaussian_kl_arguments(mean1, mean2, std1, std2)
    dtype = checks.accumulate_dtype(mean1, mean2)
    checks.require_native_dtype(dtype, mean1, "gaussian_kl")
    return _scaled_distance(mean1, mean2, sigma2, kl_of_spreads(sigma1, sigma2), dtype)


@any_batch
def gaussian_kl_from_velocity(v: Tensor, v_old: Tensor, table: StepTable, index: int | Tensor) -> Tensor:
    """KL between the transitions of two velocities at the same x, ``[N]``: kappa^2 / 2 <(v-v_old)^2> (eq. 15, 22).

    ``table`` and ``index`` as in :func:`flow_grpo_loss`; the gradient flows to ``v`` only. Exact where means of the
    transitions, rounded to half precision, are not: their difference is below the rounding of either. Result, bad
    samples and errors as in :func:`gaussian_kl`; a deterministic step raises on CPU and is inf or NaN on CUDA.
    """
    if not _native.serves(v):
        return reference.gaussian_kl_from_velocity(v, v_old, table, index)
    kappa = velocity_kl_arguments(v, v_old, table, index)
    checks.require_native_dtype(kappa.dtype, v, "gaussian_kl_from_velocity")
    std = kappa.double().abs().reciprocal()
    return _scaled_distance(v, v_old.detach(), std, torch.zeros_like(std), kappa.dtype)


def _scaled_distance(first: Tensor, second: Tensor, std: Tensor, offset: Tensor, dtype: torch.dtype) -> Tensor:
    """offset + <((first - second) / std)^2> / 2, with a gradient to both."""
    square = residual_stats(first, second, None, None, None)[:, _SQUARE]
    ordinary = (std >= _LEAST_STD) & (std <= _LARGEST_STD)
    scale = torch.where(ordinary, 0.5 / std.square(), 0)
    known = ordinary | ((square == 0) & (std > 0) & std.isfinite())
    values = torch.where(known, offset + scale * square, torch.nan).to(dtype)
    a = torch.where(torch.isfinite(values), scale, 0).to(dtype)
    coef = torch.stack([a, torch.zeros_like(a), torch.zeros_like(a)], 1)
    kl = residual_loss(first, second, None, None, None, values, coef)
    if second.requires_grad:
        kl = kl + residual_loss(second, first, None, None, None, torch.zeros_like(values), coef)
    if values_are_at_hand(std) and not ordinary.all():
        kl = torch.where(ordinary, kl, scaled_distance(first, second, std, offset, dtype))
    return kl
