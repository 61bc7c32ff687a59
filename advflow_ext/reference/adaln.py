"""Gated residuals, layer norm and AdaLN modulation in plain differentiable PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from advflow_ext.contract import blocks, checks

Branches = Sequence[tuple[Tensor, Tensor]]


def adaln_arguments(
    residual: Tensor,
    branches: Sequence[tuple[Tensor, Tensor]] | None,
    modulations: Sequence[tuple[Tensor, Tensor]] | None,
    eps: float = 0.0,
    dtype: torch.dtype | None = None,
    *,
    gated: bool = True,
) -> None:
    """No modulations: the op has none. It has branches where it is ``gated``."""
    blocks.require_tokens("residual" if gated else "x", residual)
    per_sample = (residual.shape[0], residual.shape[2])
    blocks.require_eps(eps, residual)
    if dtype is not None and dtype not in checks.FLOAT_DTYPES:
        raise ValueError(f"dtype is {dtype!r}; accepted are None, {', '.join(map(str, checks.FLOAT_DTYPES))}.")
    if not gated and modulations == ():
        raise ValueError("No branches and no modulations are given; accepted are one or two.")
    for what, pairs in {"branches": branches, "modulations": modulations}.items():
        if pairs is None and (what == "modulations" or not gated):
            continue
        if not isinstance(pairs, (tuple, list)):
            raise ValueError(f"{what} is a {type(pairs).__name__}; accepted is a list of one or two pairs.")
        if len(pairs) not in (1, 2):
            raise ValueError(f"{len(pairs)} {what} are given; accepted are one or two.")
    for i, branch in enumerate(branches or (), 1):
        blocks.require_several(f"branch {i}", branch, ("x", "gate"))
        x, gate = branch
        blocks.require_shape(f"x of branch {i}", x, residual.shape, "that of residual", residual)
        blocks.require_shape(f"gate of branch {i}", gate, per_sample, "[B, C]", residual)
        blocks.require_dtype_of("x of branch 1", branches[0][0], {f"x of branch {i}": x})  # type: ignore[index]
    for i, modulation in enumerate(modulations or (), 1):
        blocks.require_several(f"modulation {i}", modulation, ("scale", "shift"))
        scale, shift = modulation
        blocks.require_shape(f"scale of modulation {i}", scale, per_sample, "[B, C]", residual)
        blocks.require_shape(f"shift of modulation {i}", shift, per_sample, "[B, C]", residual)


def layer_norm_modulate(
    x: Tensor, *modulations: tuple[Tensor, Tensor], eps: float = 1e-6, dtype: torch.dtype | None = None
) -> tuple[Tensor, ...]:
    """Same arguments, result and errors as :func:`advflow_ext.nn.layer_norm_modulate`, by PyTorch autograd."""
    adaln_arguments(x, None, modulations, eps, dtype, gated=False)
    return _modulated(x, modulations, eps, dtype)


def gate_residual(residual: Tensor, *branches: tuple[Tensor, Tensor]) -> Tensor:
    """Same arguments, result and errors as :func:`advflow_ext.nn.gate_residual`, by PyTorch autograd."""
    adaln_arguments(residual, branches, None)
    return _gated(residual, branches)


def gate_residual_layer_norm_modulate(
    residual: Tensor,
    branches: Branches,
    modulation: tuple[Tensor, Tensor],
    *,
    eps: float = 1e-6,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Same arguments, result and errors as :func:`advflow_ext.nn.gate_residual_layer_norm_modulate`, by autograd."""
    adaln_arguments(residual, branches, (modulation,), eps, dtype)
    h = _gated(residual, branches)
    return h, _modulated(h, (modulation,), eps, dtype)[0]


def _gated(residual: Tensor, branches: Branches) -> Tensor:
    total = residual.to(_wide(residual))
    for x, gate in branches:
        total = total + gate.unsqueeze(1).to(total.dtype) * x
    return total.to(residual.dtype)


def _modulated(
    x: Tensor, modulations: Sequence[tuple[Tensor, Tensor]], eps: float, dtype: torch.dtype | None
) -> tuple[Tensor, ...]:
    xhat = F.layer_norm(x.to(_wide(x)), x.shape[-1:], eps=eps)
    return tuple(
        (xhat * (1 + scale.unsqueeze(1).to(xhat.dtype)) + shift.unsqueeze(1)).to(dtype or x.dtype)
        for scale, shift in modulations
    )


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
