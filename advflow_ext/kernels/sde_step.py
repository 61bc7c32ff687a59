"""The compiled sampler step and what a stored one says: shapes for tracing, typed entries, and the gradient."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from advflow_ext import _native
from advflow_ext.contract.checks import FLOAT_DTYPES
from advflow_ext.contract.numbers import made_in_inference_mode
from advflow_ext.kernels.raw_checks import check_column, check_latents, check_like, check_scalars, check_served


def _register_fakes() -> None:
    @torch.library.register_fake("advflow::sde_step")  # type: ignore[untyped-decorator]
    def sde_step_shapes(
        v: Tensor,
        x: Tensor,
        coef: Tensor,
        noise: Tensor | None,
        seed: Tensor | None,
        dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if (noise is None) == (seed is None):
            given = "Neither" if noise is None else "Both"
            raise RuntimeError(f"{given} of noise and seed given; accepted is exactly one of them.")
        accumulate = check_latents("sde_step", {"v": v, "x": x}, {"noise": noise})
        if seed is not None:
            check_like("seed", seed, v.shape[:1], torch.int64, v, "v")
        stored = dtype or x.dtype
        accumulate = _accumulate_with("sde_step", stored, accumulate, v)
        check_scalars(coef, None, v, accumulate)
        x_next, eps = (x.new_empty(x.shape, dtype=kind) for kind in (stored, accumulate))
        return x_next, eps, v.new_empty((v.shape[0],), dtype=torch.float64)

    @torch.library.register_fake("advflow::transition_deviation_sq")  # type: ignore[untyped-decorator]
    def transition_deviation_sq_shape(v: Tensor, x: Tensor, x_next: Tensor, coef: Tensor) -> Tensor:
        accumulate = check_latents("transition_deviation_sq", {"v": v, "x": x, "x_next": x_next}, {})
        check_scalars(coef, None, v, accumulate)
        return v.new_empty((v.shape[0],), dtype=torch.float64)

    @torch.library.register_fake("advflow::transition_deviation")  # type: ignore[untyped-decorator]
    def transition_deviation_shape(
        v: Tensor,
        x: Tensor,
        x_next: Tensor,
        coef: Tensor,
        weight: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        accumulate = check_latents("transition_deviation", {"v": v, "x": x, "x_next": x_next}, {})
        written = dtype or accumulate
        accumulate = _accumulate_with("transition_deviation", written, accumulate, v)
        check_scalars(coef, None, v, accumulate)
        check_column("weight", weight, v, accumulate)
        return x.new_empty(x.shape, dtype=written)


def _accumulate_with(op: str, written: torch.dtype, accumulate: torch.dtype, v: Tensor) -> torch.dtype:
    if written not in FLOAT_DTYPES:
        raise RuntimeError(f"dtype is {written}; accepted are float32, float16, bfloat16 and float64.")
    if written == torch.float64:
        check_served(op, written, v)
        return written
    return accumulate


if _native.module is not None:
    _register_fakes()


def sde_step_op(
    v: Tensor, x: Tensor, coef: Tensor, noise: Tensor | None, seed: Tensor | None, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    """``x_next`` in ``dtype``, ``eps`` in the accumulate dtype, ``deviation_sq`` ``[N]`` in float64, without gradient.

    ``coef`` ``[N, 3]`` is (c_x, c_v, sigma) in the accumulate dtype: float32, or float64 as soon as a tensor or
    ``dtype`` is float64. With mean = c_x x + c_v v, x_next = mean + sigma noise rounded to ``dtype`` (default ``x``'s),
    eps = (x_next - mean) / sigma of the rounded x_next, deviation_sq = <(x_next - mean)^2>, summed in float64. Where
    sigma is 0, x_next is the mean, eps and deviation_sq are 0, and noise is not read.

    Exactly one of ``noise`` (``x``'s shape) and ``seed`` (int64 ``[N]``) is given. A seed's noise is that of
    csrc/math/philox.h: it depends on the seed and on the element's index alone, CPU and CUDA draw the same integers,
    and their normals agree to a few units in the last place of float32. A row depends on its own sample only.
    """
    others = (None if tensor is None else tensor.detach() for tensor in (noise, seed))
    outputs: tuple[Tensor, Tensor, Tensor] = torch.ops.advflow.sde_step.default(
        v.detach(), x.detach(), coef.detach(), *others, dtype
    )
    return outputs


def transition_deviation_sq_op(v: Tensor, x: Tensor, x_next: Tensor, coef: Tensor) -> Tensor:
    """``deviation_sq`` of :func:`sde_step_op` for a stored ``x_next``: the same bits, without gradient."""
    given = (tensor.detach() for tensor in (v, x, x_next, coef))
    deviation_sq: Tensor = torch.ops.advflow.transition_deviation_sq.default(*given)
    return deviation_sq


def transition_deviation_op(v: Tensor, x: Tensor, x_next: Tensor, coef: Tensor) -> Tensor:
    """``eps`` of :func:`sde_step_op` for a stored ``x_next``, the deviation over sigma: the same bits, no gradient."""
    eps: Tensor = torch.ops.advflow.transition_deviation.default(*(tensor.detach() for tensor in (v, x, x_next, coef)))
    return eps


class TransitionDensity(torch.autograd.Function):
    """A number a transition ``[N]`` given from outside, whose gradient to ``v`` is slope (x_next - mean) / D.

    ``slope`` ``[N]`` is float64, and 0 for a transition that is to have an exactly zero gradient. The upstream gradient
    joins it before the kernel, which rounds once: 1 / D alone underflows float16.
    """

    @staticmethod
    def forward(ctx: Any, v: Tensor, x: Tensor, x_next: Tensor, coef: Tensor, values: Tensor, slope: Tensor) -> Tensor:
        tensors = (v, x, x_next, coef, slope)
        # What was made in inference mode has no version to watch, and autograd refuses to keep it; the context may.
        ctx.unwatched = [tensor if made_in_inference_mode(tensor) else None for tensor in tensors]
        ctx.save_for_backward(
            *(tensor if kept is None else None for tensor, kept in zip(tensors, ctx.unwatched, strict=True))
        )
        return values.detach()  # not a view, which could not be changed in place

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        v, x, x_next, coef, slope = (
            watched if kept is None else kept for watched, kept in zip(ctx.saved_tensors, ctx.unwatched, strict=True)
        )
        weight = torch.where(slope == 0, 0, slope * upstream / max(math.prod(v.shape[1:]), 1)).to(coef.dtype)
        grad = torch.ops.advflow.transition_deviation.default(v, x, x_next, coef, weight, v.dtype)
        return grad, *[None] * 5


def transition_density(v: Tensor, x: Tensor, x_next: Tensor, coef: Tensor, values: Tensor, slope: Tensor) -> Tensor:
    """Typed entry of :class:`TransitionDensity`; gradient flows to ``v`` only."""
    given = (tensor.detach() for tensor in (x, x_next, coef, values, slope))
    result: Tensor = TransitionDensity.apply(v, *given)
    return result
