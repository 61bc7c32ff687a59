"""Gated residuals, layer norm and AdaLN modulation of one token row in one pass.

Forward, up to two gated branches and up to two modulations of the same normalised row::

    h = residual + gate_1 x_1 + gate_2 x_2              rounded to the residual's dtype, then
    y_i = (h - mean(h)) / sqrt(var(h) + eps) * (1 + scale_i) + shift_i

All arithmetic is float32 and every result is rounded once. Means and variances are those of the rounded h, and the
backward pass computes them again from it, so nothing but h is kept. A row's result depends on that row alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from advflow_ext.kernels.launch import Launcher, padded, strides

# Rows a program adds up before it writes its share of a modulation's gradient. It takes them one after the other: with
# more of them a small batch leaves most of a GPU idle, with fewer the shares take an eighth of all bytes and up.
ROWS_OF_A_PARTIAL = 16
MOST_WARPS = 16  # of a program: with 32 a thread would have 64 registers left


def tiles(width: int) -> tuple[int, int]:
    """Powers of two, as Triton wants them, that cover a row: one, or one and a smaller one where they waste less."""
    whole = 1 << (width - 1).bit_length()
    head = whole // 2
    tail = 1 << max(width - head - 1, 0).bit_length()
    return (head, tail) if head + tail < whole else (whole, 0)


def forward_warps(head: int) -> int:
    """Of a program whose larger tile is ``head``. Against one warp a row of 1536, which has fewer instructions, four
    were 1 to 11 % faster on an H200, and 1 % slower with two branches."""
    return min(max(head // 256, 1), MOST_WARPS)


def backward_warps(head: int, modulation_grad: bool) -> int:
    """One warp a row of 1536, whose sums need no barrier, is the fastest here (the same measurement); a thread of
    several warps holds half as much without spilling, beside sums over rows a quarter."""
    if modulation_grad:
        return min(max(head // 256, 1), MOST_WARPS)
    return 1 if head <= 1024 else min(head // 512, MOST_WARPS)


@triton.jit
def _columns(HEAD: tl.constexpr, TAIL: tl.constexpr):
    """Of a row: all that follows works on tuples of one tile or two."""
    if TAIL > 0:
        return (tl.arange(0, HEAD), HEAD + tl.arange(0, TAIL))
    else:
        return (tl.arange(0, HEAD),)


@triton.jit
def _nothing():
    return ()


@triton.jit
def _load(pointer, columns, width):
    row = _nothing()
    for i in tl.static_range(len(columns)):
        row += (tl.load(pointer + columns[i], mask=columns[i] < width, other=0.0).to(tl.float32),)
    return row


@triton.jit
def _store(pointer, columns, row, width):
    for i in tl.static_range(len(columns)):
        tl.store(pointer + columns[i], row[i], mask=columns[i] < width)


@triton.jit
def _rounded(row, dtype: tl.constexpr):
    result = _nothing()
    for i in tl.static_range(len(row)):
        result += (row[i].to(dtype).to(tl.float32),)
    return result


@triton.jit
def _plus(a, b):
    result = _nothing()
    for i in tl.static_range(len(a)):
        result += (a[i] + b[i],)
    return result


@triton.jit
def _times(a, b):
    result = _nothing()
    for i in tl.static_range(len(a)):
        result += (a[i] * b[i],)
    return result


@triton.jit
def _sum(row):
    total = tl.sum(row[0], 0)
    for i in tl.static_range(1, len(row)):
        total += tl.sum(row[i], 0)
    return total


@triton.jit
def _normalise(h, columns, WIDTH: tl.constexpr, EPS: tl.constexpr):
    mean = _sum(h) * (1.0 / WIDTH)
    centred = _nothing()
    for i in tl.static_range(len(h)):
        centred += (tl.where(columns[i] < WIDTH, h[i] - mean, 0.0),)
    rstd = tl.rsqrt(_sum(_times(centred, centred)) * (1.0 / WIDTH) + EPS)
    xhat = _nothing()
    for i in tl.static_range(len(h)):
        xhat += (centred[i] * rstd,)
    return xhat, rstd


@triton.jit
def _one_plus(scale):
    result = _nothing()
    for i in tl.static_range(len(scale)):
        result += (1.0 + scale[i],)
    return result


@triton.jit
def _inside(row, columns, width):
    """Past the last token what is computed from nothing may be no number."""
    result = _nothing()
    for i in tl.static_range(len(row)):
        result += (tl.where(columns[i] < width, row[i], 0.0),)
    return result


@triton.jit
def _zeros(HEAD: tl.constexpr, TAIL: tl.constexpr):
    if TAIL > 0:
        return (tl.zeros((HEAD,), tl.float32), tl.zeros((TAIL,), tl.float32))
    else:
        return (tl.zeros((HEAD,), tl.float32),)


@triton.jit
def _through_norm(of_xhat, xhat, rstd, WIDTH: tl.constexpr):
    mean = _sum(of_xhat) * (rstd * (1.0 / WIDTH))
    slope = _sum(_times(of_xhat, xhat)) * (rstd * (1.0 / WIDTH))
    of_h = _nothing()
    for i in tl.static_range(len(xhat)):
        of_h += (rstd * of_xhat[i] - (mean + slope * xhat[i]),)
    return of_h


@triton.jit
def forward_kernel(
    residual, x_1, x_2, gate_1, gate_2, scale_1, scale_2, shift_1, shift_2, h_out, y_1, y_2,
    tokens, residual_sb, residual_sn, x_1_sb, x_1_sn, x_2_sb, x_2_sn,
    gate_1_sb, gate_2_sb, scale_1_sb, scale_2_sb, shift_1_sb, shift_2_sb,
    GATES: tl.constexpr, NORMS: tl.constexpr, EPS: tl.constexpr,
    WIDTH: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    sample = program // tokens  # in int32: a division in int64 is a subroutine
    token = (program - sample * tokens).to(tl.int64)
    sample, to = sample.to(tl.int64), program.to(tl.int64) * WIDTH
    columns = _columns(HEAD, TAIL)
    h = _load(residual + sample * residual_sb + token * residual_sn, columns, WIDTH)
    if GATES > 0:
        x = _load(x_1 + sample * x_1_sb + token * x_1_sn, columns, WIDTH)
        h = _plus(h, _times(_load(gate_1 + sample * gate_1_sb, columns, WIDTH), x))
        if GATES > 1:
            x = _load(x_2 + sample * x_2_sb + token * x_2_sn, columns, WIDTH)
            h = _plus(h, _times(_load(gate_2 + sample * gate_2_sb, columns, WIDTH), x))
        h = _rounded(h, h_out.dtype.element_ty)
        _store(h_out + to, columns, h, WIDTH)
    if NORMS > 0:
        xhat, _ = _normalise(h, columns, WIDTH, EPS)
        scaled = _times(xhat, _one_plus(_load(scale_1 + sample * scale_1_sb, columns, WIDTH)))
        _store(y_1 + to, columns, _plus(scaled, _load(shift_1 + sample * shift_1_sb, columns, WIDTH)), WIDTH)
        if NORMS > 1:
            scaled = _times(xhat, _one_plus(_load(scale_2 + sample * scale_2_sb, columns, WIDTH)))
            _store(y_2 + to, columns, _plus(scaled, _load(shift_2 + sample * shift_2_sb, columns, WIDTH)), WIDTH)


@triton.jit
def backward_kernel(
    h, x_1, x_2, gate_1, gate_2, scale_1, scale_2, d_h, d_y_1, d_y_2, d_residual, d_x_1, d_x_2,
    sums, tokens, chunks, h_sb, h_sn, x_1_sb, x_1_sn, x_2_sb, x_2_sn,
    gate_1_sb, gate_2_sb, scale_1_sb, scale_2_sb, d_h_sb, d_h_sn, d_y_1_sb, d_y_1_sn, d_y_2_sb, d_y_2_sn,
    GATES: tl.constexpr, NORMS: tl.constexpr, HAS_D_H: tl.constexpr, MODULATION_GRAD: tl.constexpr,
    EPS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    sample = program // chunks
    first = (program - sample * chunks).to(tl.int64) * ROWS
    sample = sample.to(tl.int64)
    columns = _columns(HEAD, TAIL)
    if GATES > 0:
        g_1 = _load(gate_1 + sample * gate_1_sb, columns, WIDTH)
    if GATES > 1:
        g_2 = _load(gate_2 + sample * gate_2_sb, columns, WIDTH)
    if NORMS > 0:
        s_1 = _one_plus(_load(scale_1 + sample * scale_1_sb, columns, WIDTH))
    if NORMS > 1:
        s_2 = _one_plus(_load(scale_2 + sample * scale_2_sb, columns, WIDTH))
    if MODULATION_GRAD:
        sum_gate_1, sum_gate_2 = _zeros(HEAD, TAIL), _zeros(HEAD, TAIL)
        sum_scale_1, sum_scale_2 = _zeros(HEAD, TAIL), _zeros(HEAD, TAIL)
        sum_shift_1, sum_shift_2 = _zeros(HEAD, TAIL), _zeros(HEAD, TAIL)
    for i in range(ROWS):
        token = first + i
        width = WIDTH if ROWS == 1 else tl.where(token < tokens, WIDTH, 0)  # no tokens past the last
        to = (sample * tokens + token) * WIDTH
        if HAS_D_H:
            d = _load(d_h + sample * d_h_sb + token * d_h_sn, columns, width)
        if NORMS > 0:
            row = _load(h + sample * h_sb + token * h_sn, columns, width)
            dy = _load(d_y_1 + sample * d_y_1_sb + token * d_y_1_sn, columns, width)
            xhat, rstd = _normalise(row, columns, WIDTH, EPS)
            of_xhat = _times(dy, s_1)
            if MODULATION_GRAD:
                sum_scale_1 = _plus(sum_scale_1, _inside(_times(dy, xhat), columns, width))
                sum_shift_1 = _plus(sum_shift_1, dy)
            if NORMS > 1:
                dy = _load(d_y_2 + sample * d_y_2_sb + token * d_y_2_sn, columns, width)
                of_xhat = _plus(of_xhat, _times(dy, s_2))
                if MODULATION_GRAD:
                    sum_scale_2 = _plus(sum_scale_2, _inside(_times(dy, xhat), columns, width))
                    sum_shift_2 = _plus(sum_shift_2, dy)
            of_h = _through_norm(of_xhat, xhat, rstd, WIDTH)
            d = _plus(d, of_h) if HAS_D_H else of_h
            _store(d_residual + to, columns, d, width)
        if GATES > 0:
            _store(d_x_1 + to, columns, _times(d, g_1), width)
            if MODULATION_GRAD:
                x = _load(x_1 + sample * x_1_sb + token * x_1_sn, columns, width)
                sum_gate_1 = _plus(sum_gate_1, _inside(_times(d, x), columns, width))
        if GATES > 1:
            _store(d_x_2 + to, columns, _times(d, g_2), width)
            if MODULATION_GRAD:
                x = _load(x_2 + sample * x_2_sb + token * x_2_sn, columns, width)
                sum_gate_2 = _plus(sum_gate_2, _inside(_times(d, x), columns, width))
    if MODULATION_GRAD:
        # One row of sums a program, added up afterwards in the order of the programs: the same bits every time.
        to = program.to(tl.int64) * WIDTH
        one = tl.num_programs(0).to(tl.int64) * WIDTH
        if GATES > 0:
            _store(sums + to, columns, sum_gate_1, WIDTH)
        if GATES > 1:
            _store(sums + one + to, columns, sum_gate_2, WIDTH)
        if NORMS > 0:
            _store(sums + GATES * one + to, columns, sum_scale_1, WIDTH)
            _store(sums + (GATES + NORMS) * one + to, columns, sum_shift_1, WIDTH)
        if NORMS > 1:
            _store(sums + (GATES + 1) * one + to, columns, sum_scale_2, WIDTH)
            _store(sums + (GATES + NORMS + 1) * one + to, columns, sum_shift_2, WIDTH)


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
    width = int(width)  # under torch.compile: a kernel is made for it
    head, tail = tiles(width)
    h = [torch.empty_like(residual, memory_format=torch.contiguous_format)] if gates else []
    y = [torch.empty_like(residual, dtype=dtype, memory_format=torch.contiguous_format) for _ in scales]
    if residual.numel():
        per_token = padded(2, branches)
        per_sample = [each for group in (gates, scales, shifts) for each in padded(2, group)]
        _launch_forward(
            (batch * tokens, 1, 1),
            (residual, *per_token, *per_sample, h[0] if h else None, *padded(2, y)),
            (tokens, *strides(2, residual, *per_token), *strides(1, *per_sample)),
            (len(gates), len(scales), eps, width, head, tail),  # GATES, NORMS, EPS, WIDTH, HEAD, TAIL
            forward_warps(head),
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
    width = int(width)  # under torch.compile: a kernel is made for it
    head, tail = tiles(width)
    rows = ROWS_OF_A_PARTIAL if modulation_grad else 1
    chunks = triton.cdiv(tokens, rows)
    d_residual = [torch.empty_like(h, memory_format=torch.contiguous_format)] if scales else []
    d_branches = [torch.empty_like(h, dtype=branch_dtype, memory_format=torch.contiguous_format) for _ in gates]
    count = len(gates) + 2 * len(scales)
    sums = [h.new_empty((count, batch, chunks, width), dtype=torch.float32)] if modulation_grad else []
    if h.numel():
        x, gate, scale, dy = (padded(2, group) for group in (branches, gates, scales, d_y))
        _launch_backward(
            (batch * chunks, 1, 1),
            (
                h, *x, *gate, *scale, d_h, *dy, d_residual[0] if d_residual else None, *padded(2, d_branches),
                sums[0] if sums else None,
            ),
            (
                tokens, chunks, *strides(2, h, *x), *strides(1, *gate, *scale), *strides(2, d_h, *dy),
            ),
            # GATES, NORMS, HAS_D_H, MODULATION_GRAD, EPS, ROWS, WIDTH, HEAD, TAIL
            (len(gates), len(scales), d_h is not None, modulation_grad, eps, rows, width, head, tail),
            backward_warps(head, modulation_grad),
        )  # fmt: skip
    return [*d_residual, *d_branches, *(each.sum(2) for each in sums)]
