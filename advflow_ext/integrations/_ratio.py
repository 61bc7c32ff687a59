"""The log-ratio of two policies from the difference of their velocities, for trainers that keep the old ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from advflow_ext import _native

_EPS_VO, _VO_SQ = 0, 1  # columns of transition_stats


def log_ratio(v: Tensor, v_old: Tensor, eps: Tensor, kappa: Tensor) -> tuple[Tensor, Tensor]:
    """kappa <eps (v - v_old)> - kappa^2 / 2 <(v - v_old)^2> with its gradient to v, and <(v - v_old)^2>, in float64.

    1e-11 from float64, where a difference of two log-probabilities is 1e-9 to 1e-8 from it.
    """
    kappa = kappa.double()
    if _native.serves(v, v_old, eps):
        stats = torch.ops.advflow.transition_stats.default(v.detach(), eps, v_old, None).double()
        along, square = stats[:, _EPS_VO], stats[:, _VO_SQ]
        values = kappa * along - kappa.square() / 2 * square
        coef = torch.stack([kappa / 2, -kappa.square() / 2, torch.zeros_like(kappa)], 1).float()
        found: Tensor = _LogRatio.apply(v, eps, v_old, values, coef)
        return found, square
    change = (v.float() - v_old.float()).flatten(1)
    along, square = (eps.flatten(1) * change).mean(1).double(), change.square().mean(1).double()
    return kappa * along - kappa.square() / 2 * square, square.detach()


class _LogRatio(torch.autograd.Function):
    """Numbers ``[N]`` given from outside with the gradient (2 / D) [coef_0 eps + coef_1 (v - v_old)]."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, eps: Tensor, v_old: Tensor, values: Tensor, coef: Tensor) -> Tensor:
        ctx.save_for_backward(v, eps, v_old, coef)
        return values.detach()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        v, eps, v_old, coef = ctx.saved_tensors
        grad = torch.ops.advflow.transition_grad.default(v, eps, v_old, None, coef, upstream.to(coef.dtype))
        return grad, None, None, None, None
