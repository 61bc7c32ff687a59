"""The forward-process core: per-sample statistics of residuals, and a loss whose gradient is a linear combination.

Every forward-process algorithm is per-sample numbers a, b, c on top of these (docs of each algorithm's op):
dL/dv = (2 / D) [a (v - u) + b (v - v_old) + c (v - v_ref)], u = noise - x0, D elements a sample.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from advflow_ext import _native
from advflow_ext._native import STATS
from advflow_ext.ops._checks import accumulate_dtype


def _register_fakes() -> None:
    @torch.library.register_fake("advflow::residual_stats")  # type: ignore[untyped-decorator]
    def residual_stats_shape(
        v: Tensor, target: Tensor, noise: Tensor | None, v_old: Tensor | None, v_ref: Tensor | None
    ) -> Tensor:
        return v.new_empty((v.shape[0], len(STATS)), dtype=accumulate_dtype(v, target, noise, v_old, v_ref))

    @torch.library.register_fake("advflow::residual_grad")  # type: ignore[untyped-decorator]
    def residual_grad_shape(
        v: Tensor, target: Tensor, noise: Tensor | None, v_old: Tensor | None, v_ref: Tensor | None, coef: Tensor
    ) -> Tensor:
        return torch.empty_like(v, memory_format=torch.contiguous_format)


if _native.module is not None:
    _register_fakes()


def residual_stats(
    v: Tensor, target: Tensor, noise: Tensor | None, v_old: Tensor | None, v_ref: Tensor | None
) -> Tensor:
    """``[B, 6]`` means over each sample, columns :data:`STATS`, without gradient; a column of an absent tensor is 0.

    ``target`` is x0 when ``noise`` is given (u = noise - x0 is formed in registers), otherwise u itself. float32, or
    float64 as soon as one input is. A row depends on its own sample only: not on batch, position or threads.
    """
    others = map(_detached, (target, noise, v_old, v_ref))
    stats: Tensor = torch.ops.advflow.residual_stats.default(v.detach(), *others)
    return stats


class ResidualLoss(torch.autograd.Function):
    """Per-sample values ``[B]`` given from outside, with the gradient above attached to ``v``.

    ``coef`` ``[B, 3]`` is (a, b, c). Samples where ``usable`` is false give exact zeros, both ways. The upstream
    gradient (a loss scale, 1/B) joins the coefficients in float32: 2 / (D B) alone would underflow float16.
    """

    @staticmethod
    def forward(
        ctx: Any,
        v: Tensor,
        target: Tensor,
        noise: Tensor | None,
        v_old: Tensor | None,
        v_ref: Tensor | None,
        values: Tensor,
        coef: Tensor,
        usable: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(v, target, noise, v_old, v_ref, coef, usable)
        return torch.where(usable, values, 0)

    @staticmethod
    def backward(ctx: Any, grad_values: Tensor) -> tuple[Tensor | None, ...]:
        v, target, noise, v_old, v_ref, coef, usable = ctx.saved_tensors
        scaled = torch.where(usable[:, None], coef * grad_values[:, None], 0)
        grad = torch.ops.advflow.residual_grad.default(v, target, noise, v_old, v_ref, scaled)
        return grad, None, None, None, None, None, None, None


def residual_loss(
    v: Tensor,
    target: Tensor,
    noise: Tensor | None,
    v_old: Tensor | None,
    v_ref: Tensor | None,
    values: Tensor,
    coef: Tensor,
    usable: Tensor,
) -> Tensor:
    """Typed entry of :class:`ResidualLoss`; gradient flows to ``v`` only."""
    others = map(_detached, (target, noise, v_old, v_ref))
    losses: Tensor = ResidualLoss.apply(v, *others, values, coef, usable)
    return losses


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()
