"""Gated residuals, layer norm and AdaLN modulation in plain differentiable PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from advflow_ext.ops._block_checks import adaln_arguments

Branches = Sequence[tuple[Tensor, Tensor]]


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
