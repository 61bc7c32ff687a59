"""The loss core: per-sample statistics, and a loss whose gradient is a linear combination of the same tensors.

Every algorithm is per-sample numbers a, b, c on top of these (docs of each algorithm's op), D elements a sample:

* forward process, u = noise - x0: dL/dv = (2 / D) [a (v - u) + b (v - v_old) + c (v - v_ref)];
* reverse process, eps the noise of a sampler step: dL/dv = (2 / D) [a eps + b (v - v_old) + c (v - v_ref)].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from advflow_ext import _native
from advflow_ext._native import STATS
from advflow_ext.contract.numbers import made_in_inference_mode
from advflow_ext.kernels.raw_checks import check_column, check_latents, check_scalars


def _register_fakes() -> None:
    @torch.library.register_fake("advflow::residual_stats")  # type: ignore[untyped-decorator]
    def residual_stats_shape(
        v: Tensor,
        target: Tensor,
        noise: Tensor | None,
        v_old: Tensor | None,
        v_ref: Tensor | None,
        mix: float = 0.0,
        mixes: Tensor | None = None,
    ) -> Tensor:
        latents = {"v": v, "target": target}, {"noise": noise, "v_old": v_old, "v_ref": v_ref}
        accumulate = check_latents("residual_stats", *latents)
        check_column("mixes", mixes, v, accumulate)
        return v.new_empty((v.shape[0], len(STATS)), dtype=accumulate)

    @torch.library.register_fake("advflow::residual_grad")  # type: ignore[untyped-decorator]
    def residual_grad_shape(
        v: Tensor,
        target: Tensor,
        noise: Tensor | None,
        v_old: Tensor | None,
        v_ref: Tensor | None,
        coef: Tensor,
        upstream: Tensor | None = None,
    ) -> Tensor:
        latents = {"v": v, "target": target}, {"noise": noise, "v_old": v_old, "v_ref": v_ref}
        check_scalars(coef, upstream, v, check_latents("residual_grad", *latents))
        return torch.empty_like(v, memory_format=torch.contiguous_format)

    @torch.library.register_fake("advflow::transition_stats")  # type: ignore[untyped-decorator]
    def transition_stats_shape(v: Tensor, eps: Tensor, v_old: Tensor, v_ref: Tensor | None) -> Tensor:
        latents = {"v": v, "eps": eps, "v_old": v_old}, {"v_ref": v_ref}
        return v.new_empty((v.shape[0], len(STATS)), dtype=check_latents("transition_stats", *latents))

    @torch.library.register_fake("advflow::transition_grad")  # type: ignore[untyped-decorator]
    def transition_grad_shape(
        v: Tensor, eps: Tensor, v_old: Tensor, v_ref: Tensor | None, coef: Tensor, upstream: Tensor | None = None
    ) -> Tensor:
        latents = {"v": v, "eps": eps, "v_old": v_old}, {"v_ref": v_ref}
        check_scalars(coef, upstream, v, check_latents("transition_grad", *latents))
        return torch.empty_like(v, memory_format=torch.contiguous_format)


if _native.module is not None:
    _register_fakes()


def residual_stats(
    v: Tensor, target: Tensor, noise: Tensor | None, v_old: Tensor | None, v_ref: Tensor | None
) -> Tensor:
    """``[B, 8]`` means over each sample, columns :data:`STATS`, without gradient; a column of an absent tensor is 0.

    ``target`` is x0 when ``noise`` is given (u = noise - x0 is formed in registers), otherwise u itself. The last two
    columns, <|(v_old - u) + mix (v - v_old)|> and the same with minus, are 0: of a mix the raw operator alone is told.
    float32, or float64 as soon as one input is. A row depends on its own sample only, not on batch or threads.
    """
    others = [_detached(tensor) for tensor in (target, noise, v_old, v_ref)]
    stats: Tensor = torch.ops.advflow.residual_stats.default(v.detach(), *others)
    return stats


class CoefficientLoss(torch.autograd.Function):
    """A loss given from outside, ``[]`` or ``[B]``, with the gradient of this module's head attached to ``v``.

    ``coef`` ``[B, 3]`` is (a, b, c), and zero for a sample that is to have an exactly zero gradient. The upstream
    gradient (a loss scale) joins the coefficients inside the kernel, in float32: 2 / (D B) alone underflows float16.
    """

    @staticmethod
    def forward(
        ctx: Any,
        v: Tensor,
        target: Tensor,
        noise: Tensor | None,
        v_old: Tensor | None,
        v_ref: Tensor | None,
        loss: Tensor,
        coef: Tensor,
    ) -> Tensor:
        tensors = (v, target, noise, v_old, v_ref, coef)
        # What was made in inference mode has no version to watch, and autograd refuses to keep it; the context may.
        ctx.unwatched = [tensor if made_in_inference_mode(tensor) else None for tensor in tensors]
        ctx.save_for_backward(
            *(tensor if kept is None else None for tensor, kept in zip(tensors, ctx.unwatched, strict=True))
        )
        return loss.detach()  # not a view, which could not be changed in place

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        v, target, noise, v_old, v_ref, coef = (
            watched if kept is None else kept for watched, kept in zip(ctx.saved_tensors, ctx.unwatched, strict=True)
        )
        grad = torch.ops.advflow.residual_grad.default(v, target, noise, v_old, v_ref, coef, upstream)
        return grad, *[None] * 6


def residual_loss(
    v: Tensor,
    target: Tensor,
    noise: Tensor | None,
    v_old: Tensor | None,
    v_ref: Tensor | None,
    loss: Tensor,
    coef: Tensor,
) -> Tensor:
    """Typed entry of :class:`CoefficientLoss`; gradient flows to ``v`` only."""
    others = map(_detached, (target, noise, v_old, v_ref))
    result: Tensor = CoefficientLoss.apply(v, *others, loss, coef)
    return result


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()
