"""Argument checks shared by every implementation of a loss, so that native and reference refuse the same calls."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from advflow_ext.ops._outputs import warn_nonconvex

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def require_choice(name: str, value: object, accepted: Sequence[str]) -> None:
    if value not in accepted:
        listed = ", ".join(repr(choice) for choice in accepted)
        raise ValueError(f"{name} is {value!r}; accepted are {listed}.")


def require_number(name: str, value: object, *, low: float = -math.inf, exclusive: bool = False) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or value < low or (exclusive and value == low):  # type: ignore[operator]
        bound = "" if low == -math.inf else f" {'above' if exclusive else 'of at least'} {low:g}"
        raise ValueError(f"{name} is {value!r}; accepted is a finite number{bound}.")


def require_float_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} is a {type(value).__name__}; accepted is a floating-point torch.Tensor.")
    if value.dtype not in FLOAT_DTYPES:
        raise ValueError(f"{name} has dtype {value.dtype}; accepted are float32, float16, bfloat16 and float64.")


def require_like_v(name: str, value: object, v: Tensor) -> None:
    require_float_tensor(name, value)
    assert isinstance(value, Tensor)
    if value.shape != v.shape:
        raise ValueError(f"{name} has shape {list(value.shape)}; accepted is the shape of v, {list(v.shape)}.")
    if value.device != v.device:
        raise ValueError(f"{name} is on {value.device}; accepted is the device of v, {v.device}.")


def require_per_sample(name: str, value: object, v: Tensor) -> None:
    require_float_tensor(name, value)
    assert isinstance(value, Tensor)
    if value.shape != v.shape[:1]:
        raise ValueError(f"{name} has shape {list(value.shape)}; accepted is one value a sample, [{v.shape[0]}].")
    if value.device != v.device:
        raise ValueError(f"{name} is on {value.device}; accepted is the device of v, {v.device}.")


def accumulate_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 as soon as one latent is float64, float32 otherwise: the type every sum is kept in."""
    wide = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


class SampleScalars(NamedTuple):
    """The per-sample numbers of the three-term loss in the accumulate dtype, detached. All [B]."""

    t: Tensor
    advantages: Tensor
    gamma: Tensor
    lam: Tensor
    curvature: Tensor
    nonconvex: Tensor  # bool
    valid_t: Tensor  # bool


WEIGHTINGS = ("prediction", "velocity", "adaptive")
REDUCTIONS = ("mean", "sum", "none")


def advantage_flow_arguments(
    v: Tensor,
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    advantages: Tensor,
    v_old: Tensor,
    v_ref: Tensor | None,
    gamma: float | Tensor | str,
    lam: float,
    weighting: str,
    reduction: str,
) -> SampleScalars:
    require_float_tensor("v", v)
    if v.dim() < 2:
        raise ValueError(f"v has shape {list(v.shape)}; accepted are a batch dimension and at least one more.")
    for name, latent in (("x0", x0), ("noise", noise), ("v_old", v_old)):
        require_like_v(name, latent, v)
    if v_ref is not None:
        require_like_v("v_ref", v_ref, v)
    require_per_sample("t", t, v)
    require_per_sample("advantages", advantages, v)
    require_number("lam", lam, low=0.0)
    require_choice("weighting", weighting, WEIGHTINGS)
    require_choice("reduction", reduction, REDUCTIONS)

    dtype = accumulate_dtype(v, x0, noise, v_old, v_ref)
    t = t.detach().to(dtype)
    advantages = advantages.detach().to(dtype)
    gammas = _gamma_per_sample(gamma, advantages, v)
    lams = torch.full_like(advantages, lam if v_ref is not None else 0.0)
    curvature = advantages + gammas + lams
    scalars = SampleScalars(t, advantages, gammas, lams, curvature, curvature <= 0, (t > 0) & (t <= 1))
    if v.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_values(scalars)
    return scalars


def _gamma_per_sample(gamma: float | Tensor | str, advantages: Tensor, v: Tensor) -> Tensor:
    if isinstance(gamma, Tensor):
        require_per_sample("gamma", gamma, v)
        return gamma.detach().to(advantages.dtype)
    if isinstance(gamma, str):
        if gamma != "1-A":
            raise ValueError(f'gamma is {gamma!r}; accepted are a number, a [B] tensor and "1-A".')
        return 1 - advantages
    if isinstance(gamma, bool) or not isinstance(gamma, (int, float)) or not math.isfinite(gamma):
        raise ValueError(f'gamma is {gamma!r}; accepted are a finite number, a [B] tensor and "1-A".')
    return torch.full_like(advantages, gamma)


def _check_values(scalars: SampleScalars) -> None:
    # Only where reading a value costs no device wait; on CUDA the same facts are counted in the metrics. A t that is
    # not finite is a damaged sample rather than a wrong argument: dropped and counted everywhere.
    t, curvature = scalars.t, scalars.curvature
    if not scalars.valid_t.all() and (wrong := t.isfinite() & ~scalars.valid_t).any():
        first = int(wrong.nonzero()[0])
        raise ValueError(
            f"t[{first}] is {t[first].item():.6g}; accepted is 0 < t <= 1 (t = 0 is data, t = 1 is noise)."
        )
    if scalars.nonconvex.any() and (below := curvature[scalars.nonconvex & curvature.isfinite()]).numel():
        warn_nonconvex(below.numel(), float(below.min()), stacklevel=5)  # the caller of the loss
