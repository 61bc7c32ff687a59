"""Gated residuals, layer norm and AdaLN modulation of one token row in one pass.

Forward, up to two gated branches and up to two modulations of the same normalised row::

    h = residual + gate_1 x_1 + gate_2 x_2              rounded to the residual's dtype, then
    y_i = (h - mean(h)) / sqrt(var(h) + eps) * (1 + scale_i) + shift_i

All arithmetic is float32 and every result is rounded once. Means and variances are those of the rounded h, and the
backward pass computes them again from it, so nothing but h is kept. A row's result depends on that row alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from advflow_ext.kernels.launch import Launcher

# Rows a program adds up before it writes its share of a modulation's gradient. It takes them one after the other: with
# more of them a small batch leaves most of a GPU idle, with fewer the shares take an eighth of all bytes and up.
ROWS_OF_A_PARTIAL = 16


def block_of(width: int) -> int:
    """The next power of two. Triton's own function takes more than a microsecond of every call."""
    return 1 << (width - 1).bit_length()


def warps(block: int, modulation_grad: bool) -> int:
    """Sums over rows are kept in registers, of which a thread has 255: they need twice as many threads."""
    return 4 if block <= 2048 and not modulation_grad else 8


@triton.jit
def _normalise(h, inside, width, eps):
    mean = tl.sum(h, 0) / width
    centred = tl.where(inside, h - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 0) / width + eps)
    return centred * rstd, rstd


@triton.jit
def forward_kernel(
    residual, x_1, x_2, gate_1, gate_2, scale_1, scale_2, shift_1, shift_2, h_out, y_1, y_2,
    tokens, width, eps, residual_sb, residual_sn, x_1_sb, x_1_sn, x_2_sb, x_2_sn,
    gate_1_sb, gate_2_sb, scale_1_sb, scale_2_sb, shift_1_sb, shift_2_sb,
    GATES: tl.constexpr, NORMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    sample, token = row // tokens, row % tokens
    column = tl.arange(0, BLOCK)
    inside = column < width
    h = tl.load(residual + sample * residual_sb + token * residual_sn + column, mask=inside, other=0.0)
    if GATES > 0:
        dtype = h.dtype
        x = tl.load(x_1 + sample * x_1_sb + token * x_1_sn + column, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(gate_1 + sample * gate_1_sb + column, mask=inside, other=0.0).to(tl.float32)
        total = h.to(tl.float32) + g * x
        if GATES > 1:
            x = tl.load(x_2 + sample * x_2_sb + token * x_2_sn + column, mask=inside, other=0.0).to(tl.float32)
            g = tl.load(gate_2 + sample * gate_2_sb + column, mask=inside, other=0.0).to(tl.float32)
            total = total + g * x
        h = total.to(dtype)
        tl.store(h_out + row * width + column, h, mask=inside)
    if NORMS > 0:
        xhat, _ = _normalise(h.to(tl.float32), inside, width, eps)
        scale = tl.load(scale_1 + sample * scale_1_sb + column, mask=inside, other=0.0).to(tl.float32)
        shift = tl.load(shift_1 + sample * shift_1_sb + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(y_1 + row * width + column, xhat * (1.0 + scale) + shift, mask=inside)
        if NORMS > 1:
            scale = tl.load(scale_2 + sample * scale_2_sb + column, mask=inside, other=0.0).to(tl.float32)
            shift = tl.load(shift_2 + sample * shift_2_sb + column, mask=inside, other=0.0).to(tl.float32)
            tl.store(y_2 + row * width + column, xhat * (1.0 + scale) + shift, mask=inside)


@triton.jit
def backward_kernel(
    h, x_1, x_2, gate_1, gate_2, scale_1, scale_2, d_h, d_y_1, d_y_2, d_residual, d_x_1, d_x_2,
    d_gate_1, d_gate_2, d_scale_1, d_scale_2, d_shift_1, d_shift_2,
    tokens, width, eps, chunks, h_sb, h_sn, x_1_sb, x_1_sn, x_2_sb, x_2_sn,
    gate_1_sb, gate_2_sb, scale_1_sb, scale_2_sb, d_h_sb, d_h_sn, d_y_1_sb, d_y_1_sn, d_y_2_sb, d_y_2_sn,
    GATES: tl.constexpr, NORMS: tl.constexpr, HAS_D_H: tl.constexpr, MODULATION_GRAD: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    sample, chunk = program // chunks, program % chunks
    column = tl.arange(0, BLOCK)
    inside = column < width
    if GATES > 0:
        g_1 = tl.load(gate_1 + sample * gate_1_sb + column, mask=inside, other=0.0).to(tl.float32)
    if GATES > 1:
        g_2 = tl.load(gate_2 + sample * gate_2_sb + column, mask=inside, other=0.0).to(tl.float32)
    if NORMS > 0:
        s_1 = 1.0 + tl.load(scale_1 + sample * scale_1_sb + column, mask=inside, other=0.0).to(tl.float32)
    if NORMS > 1:
        s_2 = 1.0 + tl.load(scale_2 + sample * scale_2_sb + column, mask=inside, other=0.0).to(tl.float32)
    if MODULATION_GRAD:
        sum_gate_1 = tl.zeros((BLOCK,), tl.float32)
        sum_gate_2 = tl.zeros((BLOCK,), tl.float32)
        sum_scale_1 = tl.zeros((BLOCK,), tl.float32)
        sum_scale_2 = tl.zeros((BLOCK,), tl.float32)
        sum_shift_1 = tl.zeros((BLOCK,), tl.float32)
        sum_shift_2 = tl.zeros((BLOCK,), tl.float32)
    for i in range(ROWS):
        token = chunk * ROWS + i
        live = column < tl.where(token < tokens, width, 0)
        to = (sample * tokens + token) * width + column
        d = tl.zeros((BLOCK,), tl.float32)
        if NORMS > 0:
            row = tl.load(h + sample * h_sb + token * h_sn + column, mask=live, other=0.0).to(tl.float32)
            xhat, rstd = _normalise(row, inside, width, eps)
            dy = tl.load(d_y_1 + sample * d_y_1_sb + token * d_y_1_sn + column, mask=live, other=0.0).to(tl.float32)
            of_xhat = dy * s_1
            if MODULATION_GRAD:
                sum_scale_1 += tl.where(live, dy * xhat, 0.0)  # past the last token xhat may be no number
                sum_shift_1 += dy
            if NORMS > 1:
                dy = tl.load(d_y_2 + sample * d_y_2_sb + token * d_y_2_sn + column, mask=live, other=0.0).to(tl.float32)
                of_xhat += dy * s_2
                if MODULATION_GRAD:
                    sum_scale_2 += tl.where(live, dy * xhat, 0.0)
                    sum_shift_2 += dy
            d = rstd * (of_xhat - tl.sum(of_xhat, 0) / width - xhat * (tl.sum(of_xhat * xhat, 0) / width))
        if HAS_D_H:
            d += tl.load(d_h + sample * d_h_sb + token * d_h_sn + column, mask=live, other=0.0).to(tl.float32)
        if NORMS > 0:
            tl.store(d_residual + to, d, mask=live)
        if GATES > 0:
            tl.store(d_x_1 + to, d * g_1, mask=live)
            if MODULATION_GRAD:
                x = tl.load(x_1 + sample * x_1_sb + token * x_1_sn + column, mask=live, other=0.0).to(tl.float32)
                sum_gate_1 += tl.where(live, d * x, 0.0)
        if GATES > 1:
            tl.store(d_x_2 + to, d * g_2, mask=live)
            if MODULATION_GRAD:
                x = tl.load(x_2 + sample * x_2_sb + token * x_2_sn + column, mask=live, other=0.0).to(tl.float32)
                sum_gate_2 += tl.where(live, d * x, 0.0)
    if MODULATION_GRAD:
        # One row of sums a program, added up afterwards in the order of the programs: the same bits every time.
        to = program * width + column
        if GATES > 0:
            tl.store(d_gate_1 + to, sum_gate_1, mask=inside)
        if GATES > 1:
            tl.store(d_gate_2 + to, sum_gate_2, mask=inside)
        if NORMS > 0:
            tl.store(d_scale_1 + to, sum_scale_1, mask=inside)
            tl.store(d_shift_1 + to, sum_shift_1, mask=inside)
        if NORMS > 1:
            tl.store(d_scale_2 + to, sum_scale_2, mask=inside)
            tl.store(d_shift_2 + to, sum_shift_2, mask=inside)


_launch_forward, _launch_backward = Launcher(forward_kernel), Launcher(backward_kernel)


def forward(
    residual: Tensor,
    branches: Sequence[Tensor],
    gates: Sequence[Tensor],
    scales: Sequence[Tensor],
    shifts: Sequence[Tensor],
    eps: float,
    dtype: torch.dtype,
) -> list[Tensor]:
    """h, if there are gates, and one y in ``dtype`` for each scale. ``[B, N, C]``; gates, scales, shifts ``[B, C]``."""
    batch, tokens, width = residual.shape
    block = block_of(width)
    h = [torch.empty_like(residual, memory_format=torch.contiguous_format)] if gates else []
    y = [torch.empty_like(residual, dtype=dtype, memory_format=torch.contiguous_format) for _ in scales]
    if residual.numel():
        per_token = _pair(residual, branches)
        per_sample = [each for group in (gates, scales, shifts) for each in _pair(residual, group)]
        _launch_forward(
            (batch * tokens, 1, 1),
            (residual, *per_token, *per_sample, (h or y)[0], *_pair(residual, y)),
            (tokens, width, eps, *_row_strides(residual, *per_token), *(each.stride(0) for each in per_sample)),
            (len(gates), len(scales), block),  # GATES, NORMS, BLOCK
            warps(block, False),
        )
    return [*h, *y]


def backward(
    h: Tensor,
    branches: Sequence[Tensor],
    gates: Sequence[Tensor],
    scales: Sequence[Tensor],
    d_h: Tensor | None,
    d_y: Sequence[Tensor],
    eps: float,
    branch_dtype: torch.dtype,
    modulation_grad: bool,
) -> list[Tensor]:
    """Gradients of the residual (only where there are scales, else it is ``d_h`` itself), then of each branch, and with
    ``modulation_grad`` of all gates, scales and shifts, ``[their number, B, C]`` in float32.

    ``h`` is what was normalised; ``branches`` are needed for ``modulation_grad`` alone.
    """
    batch, tokens, width = h.shape
    block = block_of(width)
    rows = ROWS_OF_A_PARTIAL if modulation_grad else 1
    chunks = triton.cdiv(tokens, rows)
    d_residual = [torch.empty_like(h, memory_format=torch.contiguous_format)] if scales else []
    d_branches = [torch.empty_like(h, dtype=branch_dtype, memory_format=torch.contiguous_format) for _ in gates]
    sums = len(gates) + 2 * len(scales) if modulation_grad else 0
    partials = h.new_empty((sums, batch, chunks, width), dtype=torch.float32)
    if h.numel():
        d_gates, rest = partials[: len(gates)], partials[len(gates) :]
        d_scales, d_shifts = rest[: len(scales)], rest[len(scales) :]
        x, gate, scale, dy = (_pair(h, group) for group in (branches, gates, scales, d_y))
        added = h if d_h is None else d_h
        _launch_backward(
            (batch * chunks, 1, 1),
            (
                h, *x, *gate, *scale, added, *dy, (d_residual or d_branches)[0], *_pair(h, d_branches),
                *_pair(h, d_gates), *_pair(h, d_scales), *_pair(h, d_shifts),
            ),
            (
                tokens, width, eps, chunks, *_row_strides(h, *x), *(each.stride(0) for each in (*gate, *scale)),
                *_row_strides(added, *dy),
            ),
            # GATES, NORMS, HAS_D_H, MODULATION_GRAD, ROWS, BLOCK
            (len(gates), len(scales), d_h is not None, modulation_grad, rows, block),
            warps(block, modulation_grad),
        )  # fmt: skip
    return [*d_residual, *d_branches, *([partials.sum(2)] if modulation_grad else [])]


def _pair(filler: Tensor, tensors: Sequence[Tensor] | Tensor) -> list[Tensor]:
    """Exactly two of ``tensors``; ``filler`` stands for those that the kernel will not touch."""
    return [*tensors, filler, filler][:2]


def _row_strides(*tensors: Tensor) -> list[Any]:
    return [stride for tensor in tensors for stride in tensor.stride()[:2]]
