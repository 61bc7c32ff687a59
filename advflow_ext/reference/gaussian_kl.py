"""KL divergence of isotropic Gaussians (arXiv 2606.11025 eq. 14, 20) in plain differentiable PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from advflow_ext.contract import checks, transitions
from advflow_ext.contract.batches import any_batch
from advflow_ext.contract.checks import accumulate_dtype
from advflow_ext.contract.numbers import (
    require_number,
    values_are_at_hand,
)
from advflow_ext.contract.step_table import StepRows, StepTable
from advflow_ext.reference._forward import mean


def gaussian_kl_arguments(
    mean1: Tensor, mean2: Tensor, std1: float | Tensor, std2: float | Tensor | None
) -> tuple[Tensor, Tensor]:
    """Both standard deviations in float64, ``[N]``: the difference of their logarithms cancels."""
    checks.require_latent("mean1", mean1)
    checks.require_float_tensor("mean2", mean2)
    if mean2.shape != mean1.shape:
        raise ValueError(f"mean2 has shape {list(mean2.shape)}; accepted is that of mean1, {list(mean1.shape)}.")
    if mean2.device != mean1.device:
        raise ValueError(f"mean2 is on {mean2.device}; accepted is the device of mean1, {mean1.device}.")
    first = _std_per_sample("std1", std1, mean1)
    return first, first if std2 is None else _std_per_sample("std2", std2, mean1)


def _std_per_sample(name: str, std: float | Tensor, mean: Tensor) -> Tensor:
    if not isinstance(std, Tensor):
        require_number(name, std, low=0.0, exclusive=True)
        # An addition: torch.full would keep the number in a graph, which one that changes compiles anew.
        return mean.new_zeros(mean.shape[:1], dtype=torch.float64) + 1.0 * std
    single = std.dim() == 0
    here = std.device == mean.device or (single and std.device.type == "cpu")
    if not std.is_floating_point() or not (single or std.shape == mean.shape[:1]) or not here:
        raise ValueError(
            f"{name} is {std.dtype} {list(std.shape)} on {std.device}; accepted are a number and a floating-point "
            f"tensor [{mean.shape[0]}] on {mean.device}."
        )
    std = std.detach().to(mean.device, torch.float64).expand(mean.shape[:1])
    if values_are_at_hand(std) and (wrong := ~((std > 0) & std.isfinite())).any():
        first = int(wrong.nonzero()[0])
        raise ValueError(f"{name}[{first}] is {std[first].item():.6g}; accepted are numbers above 0 that are finite.")
    return std


def velocity_kl_arguments(v: Tensor, v_old: Tensor, table: StepTable, index: int | Tensor) -> Tensor:
    """kappa of the transitions in the accumulate dtype."""
    checks.require_latent("v", v)
    checks.require_like_v("v_old", v_old, v)
    columns, _ = transitions.steps_of(v, table, index, checks.accumulate_dtype(v, v_old))
    return StepRows(*columns.unbind(1)).kappa


@any_batch
def gaussian_kl(mean1: Tensor, mean2: Tensor, std1: float | Tensor, std2: float | Tensor | None = None) -> Tensor:
    """Same arguments, result and errors as :func:`advflow_ext.gaussian_kl`, by PyTorch autograd."""
    sigma1, sigma2 = gaussian_kl_arguments(mean1, mean2, std1, std2)
    return scaled_distance(mean1, mean2, sigma2, kl_of_spreads(sigma1, sigma2), accumulate_dtype(mean1, mean2))


@any_batch
def gaussian_kl_from_velocity(v: Tensor, v_old: Tensor, table: StepTable, index: int | Tensor) -> Tensor:
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
