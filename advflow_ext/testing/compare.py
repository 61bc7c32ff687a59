"""How far a result may be from its float64 truth, and why."""

from __future__ import annotations

import torch
from torch import Tensor

# Half the distance between neighbours, relative: what one rounding to the type costs at most.
UNIT_ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}

# Relative error of a loss or a whole gradient before the output is rounded, by accumulate type. float32: sums of up to
# 32 terms a lane stay near 1e-7, and the promise is 1e-6. float64: the same algorithm with 2^29 times less roundoff.
ACCUMULATED_ERROR = {torch.float32: 1e-6, torch.float64: 1e-14}


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """||actual - truth|| / ||truth|| in float64; 0 when both are zero."""
    actual, truth = actual.detach().double(), truth.detach().double().to(actual.device)
    size = float(truth.norm())
    difference = float((actual - truth).norm())
    return difference / size if size > 0 else difference


def assert_close_to_truth(actual: Tensor, truth: Tensor, tolerance: float) -> None:
    error = relative_error(actual, truth)
    assert error <= tolerance, f"relative error {error:.3g} exceeds {tolerance:.3g}"


def assert_rounded_once(actual: Tensor, truth: Tensor, accumulated: float = 1e-6) -> None:
    """Each element lies within one rounding of its truth, apart from the error accumulated before the rounding.

    Beneath the smallest normal number the distance between neighbours is constant, which the second term covers.
    """
    dtype = actual.dtype
    truth = truth.detach().double()
    scale = truth.abs().max().item() if truth.numel() else 0.0
    info = torch.finfo(dtype)
    allowed = truth.abs() * UNIT_ROUNDOFF[dtype] * 1.001 + info.tiny * UNIT_ROUNDOFF[dtype] + accumulated * scale
    excess = ((actual.detach().double() - truth).abs() - allowed).max().item() if truth.numel() else 0.0
    assert excess <= 0, f"an element is {excess:.3g} further from the truth than one rounding to {dtype} explains"
