"""Gated residuals, layer norm and AdaLN modulation of the SD3 blocks, each tensor read and written once."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from advflow_ext import reference
from advflow_ext.kernels import triton_ops
from advflow_ext.reference.adaln import adaln_arguments


def layer_norm_modulate(
    x: Tensor, *modulations: tuple[Tensor, Tensor], eps: float = 1e-6, dtype: torch.dtype | None = None
) -> tuple[Tensor, ...]:
    """y_i = layer_norm(x) (1 + scale_i) + shift_i: AdaLN with one output, or with two (SD3.5's AdaLayerNormZeroX).

    Arguments:
        x: ``[B, N, C]``; rows may be strided. Layer norm is over C, without weight and bias.
        modulations: one or two pairs (scale, shift), ``[B, C]`` each, as chunks of one projection are.
        dtype: of the results; None: that of x.

    Returns one ``[B, N, C]`` for each pair. Arithmetic is float32, each result is rounded once; stock modules round
    three times in half precision. Gradients of scale and shift are computed only where one of them asks for one. On
    float64, or where Triton cannot run, :func:`advflow_ext.reference.layer_norm_modulate` serves.

    Raises ValueError, naming argument, value and what is accepted.
    """
    adaln_arguments(x, None, modulations, eps, dtype, gated=False)
    if not triton_ops.serves(x):
        return reference.layer_norm_modulate(x, *modulations, eps=eps, dtype=dtype)
    return _apply(x, (), modulations, eps, dtype)


def gate_residual(residual: Tensor, *branches: tuple[Tensor, Tensor]) -> Tensor:
    """residual + gate_1 x_1 (+ gate_2 x_2).

    Arguments:
        residual: ``[B, N, C]``; rows may be strided.
        branches: one or two pairs (x, gate): x like residual, all of one dtype, gate ``[B, C]``.

    Returns ``[B, N, C]`` in residual's dtype, added up in float32 and rounded once. x is kept for the backward pass
    only where a gate asks for a gradient. On float64, or where Triton cannot run,
    :func:`advflow_ext.reference.gate_residual` serves.

    Raises ValueError, naming argument, value and what is accepted.
    """
    adaln_arguments(residual, branches, None)
    if not triton_ops.serves(residual):
        return reference.gate_residual(residual, *branches)
    return _apply(residual, branches, (), 0.0, None)[0]


def gate_residual_layer_norm_modulate(
    residual: Tensor,
    branches: Sequence[tuple[Tensor, Tensor]],
    modulation: tuple[Tensor, Tensor],
    *,
    eps: float = 1e-6,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """h = :func:`gate_residual` (residual, branches) and :func:`layer_norm_modulate` (h, modulation), in one launch.

    Means and variances are those of the rounded h, so the result is that of the two calls to the bit.
    Arguments, gradients and errors are those of the two. Returns (h, y).
    """
    adaln_arguments(residual, branches, (modulation,), eps, dtype)
    if not triton_ops.serves(residual):
        return reference.gate_residual_layer_norm_modulate(residual, branches, modulation, eps=eps, dtype=dtype)
    h, y = _apply(residual, branches, (modulation,), eps, dtype)
    return h, y


def _apply(
    residual: Tensor,
    branches: Sequence[tuple[Tensor, Tensor]],
    modulations: Sequence[tuple[Tensor, Tensor]],
    eps: float,
    dtype: torch.dtype | None,
) -> tuple[Tensor, ...]:
    columns = [*zip(*branches, strict=True)] or [(), ()]
    columns += [*zip(*modulations, strict=True)] or [(), ()]
    groups = [triton_ops.unit_stride(column) for column in columns]
    (residual,) = triton_ops.unit_stride((residual,))
    dtype = dtype or residual.dtype
    tensors = [tensor for group in groups for tensor in group]
    if triton_ops.differentiated((residual, *tensors)):
        found: tuple[Tensor, ...] = _AdaLN.apply(len(branches), len(modulations), eps, dtype, residual, *tensors)
        return found
    return tuple(torch.ops.advflow.adaln(residual, *groups, eps, dtype))


class _AdaLN(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, gate_count: int, norms: int, eps: float, dtype: torch.dtype, residual: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        branches, gates, scales, shifts = _groups(tensors, gate_count, norms)
        results = torch.ops.advflow.adaln(residual, branches, gates, scales, shifts, eps, dtype)
        modulation_grad = any(ctx.needs_input_grad[5 + gate_count :])
        h = [results[0] if gate_count else residual] if norms else []
        ctx.save_for_backward(*h, *(branches if modulation_grad else ()), *gates, *scales)
        ctx.gates, ctx.norms, ctx.eps, ctx.modulation_grad = gate_count, norms, eps, modulation_grad
        ctx.branch_dtype = branches[0].dtype if branches else residual.dtype
        ctx.modulation_dtypes = [tensor.dtype for tensor in (*gates, *scales, *shifts)]
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gates, norms = ctx.gates, ctx.norms
        incoming = triton_ops.unit_stride(grads)
        d_h, d_y = (incoming[0], incoming[1:]) if gates else (None, incoming)
        saved = ctx.saved_tensors  # once: under gradient checkpointing each look at it is a recomputation
        normalised, kept = (saved[:1], saved[1:]) if norms else ((d_h,), saved)
        branches, kept = (kept[:gates], kept[gates:]) if ctx.modulation_grad else ((), kept)
        found = torch.ops.advflow.adaln_backward(
            normalised[0],
            branches,
            kept[:gates],
            kept[gates:],
            d_h,
            d_y,
            ctx.eps,
            ctx.branch_dtype,
            ctx.modulation_grad,
        )
        # Without a norm the residual's gradient is what came in.
        d_residual, d_rest = (found[0], found[1:]) if norms else (d_h, found)
        d_modulations: list[Tensor | None] = [None] * len(ctx.modulation_dtypes)
        if ctx.modulation_grad:
            d_modulations = [d.to(dtype) for d, dtype in zip(d_rest[gates], ctx.modulation_dtypes, strict=True)]
        return None, None, None, None, d_residual, *d_rest[:gates], *d_modulations


def _groups(tensors: tuple[Tensor, ...], gates: int, norms: int) -> tuple[tuple[Tensor, ...], ...]:
    """Branches, gates, scales, shifts."""
    ends = (0, gates, 2 * gates, 2 * gates + norms, 2 * gates + 2 * norms)
    return tuple(tensors[start:end] for start, end in itertools.pairwise(ends))


def _forward_shapes(
    residual: Tensor,
    branches: list[Tensor],
    gates: list[Tensor],
    scales: list[Tensor],
    shifts: list[Tensor],
    eps: float,
    dtype: torch.dtype,
) -> list[Tensor]:
    h = [residual.new_empty(residual.shape)] if gates else []
    return h + [residual.new_empty(residual.shape, dtype=dtype) for _ in scales]


def _backward_shapes(
    h: Tensor,
    branches: list[Tensor],
    gates: list[Tensor],
    scales: list[Tensor],
    d_h: Tensor | None,
    d_y: list[Tensor],
    eps: float,
    branch_dtype: torch.dtype,
    modulation_grad: bool,
) -> list[Tensor]:
    found = [h.new_empty(h.shape) for _ in scales[:1]] + [h.new_empty(h.shape, dtype=branch_dtype) for _ in gates]
    if modulation_grad:
        sums = len(gates) + 2 * len(scales)
        found.append(h.new_empty((sums, h.shape[0], h.shape[2]), dtype=torch.float32))
    return found


triton_ops.define(
    "adaln(Tensor residual, Tensor[] branches, Tensor[] gates, Tensor[] scales, Tensor[] shifts, float eps, "
    "ScalarType dtype) -> Tensor[]",
    "adaln",
    "forward",
    _forward_shapes,
)
triton_ops.define(
    "adaln_backward(Tensor h, Tensor[] branches, Tensor[] gates, Tensor[] scales, Tensor? d_h, Tensor[] d_y, "
    "float eps, ScalarType branch_dtype, bool modulation_grad) -> Tensor[]",
    "adaln",
    "backward",
    _backward_shapes,
)
