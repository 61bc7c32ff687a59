"""RMS norm of queries and keys per head, rotated or not, written straight into the buffers that joint attention reads.

One program handles ``ROWS`` (token, head) pairs of one of q, k and v. A sample's tokens are those of the image followed
by those of the text; a program that straddles the border loads from both with complementary masks. A row's result
depends on that row alone, so it never depends on the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from advflow_ext.kernels.launch import Launcher, padded, strides

ROWS = 32
FORWARD_WARPS = 4
BACKWARD_WARPS = 4


@triton.jit
def _rows_of_program(rows, tokens, heads, ROWS: tl.constexpr):
    # Divisions in int32: one in int64 is a subroutine several times as long. Offsets are int64.
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    pair = row // heads
    sample = pair // tokens
    token, head = pair - sample * tokens, row - pair * heads
    return row.to(tl.int64), row < rows, sample.to(tl.int64), token.to(tl.int64), head.to(tl.int64)


@triton.jit
def _load_rows(
    image, text, image_sb, image_sn, text_sb, text_sn, sample, token, head, live, image_tokens,
    HAS_TEXT: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, D)
    from_image = token < image_tokens
    offset = sample * image_sb + token * image_sn + head * D
    x = tl.load(image + offset[:, None] + column[None, :], mask=(live & from_image)[:, None], other=0.0).to(tl.float32)
    if HAS_TEXT:
        offset = sample * text_sb + (token - image_tokens) * text_sn + head * D
        from_text = live & (token >= image_tokens)
        y = tl.load(text + offset[:, None] + column[None, :], mask=from_text[:, None], other=0.0).to(tl.float32)
        x = tl.where(from_image[:, None], x, y)
    return x


@triton.jit
def _load_weight(weight, text_weight, token, image_tokens, HAS_TEXT: tl.constexpr, D: tl.constexpr):
    column = tl.arange(0, D)
    w = tl.load(weight + column).to(tl.float32)[None, :]
    if HAS_TEXT:
        w = tl.where((token < image_tokens)[:, None], w, tl.load(text_weight + column).to(tl.float32)[None, :])
    return w


@triton.jit
def _rotated(x, rotary, token, live, BACK: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr):
    # Elements 2i and 2i + 1 of a row, by the angle whose cosine and sine stand in the same places of its token's.
    angles = tl.load(rotary + (token * D)[:, None] + tl.arange(0, D)[None, :], mask=live[:, None], other=0.0)
    cos, sin = tl.split(tl.reshape(angles.to(tl.float32), (ROWS, D // 2, 2)))
    if BACK:
        sin = -sin
    even, odd = tl.split(tl.reshape(x, (ROWS, D // 2, 2)))
    return tl.reshape(tl.join(even * cos - odd * sin, odd * cos + even * sin), (ROWS, D))


@triton.jit
def _write_joint(
    image, text, weight, text_weight, rotary, joint, rstd, rows, tokens, image_tokens, heads,
    image_sb, image_sn, text_sb, text_sn,
    NORM: tl.constexpr, KEEP_RSTD: tl.constexpr, HAS_TEXT: tl.constexpr, ROTARY: tl.constexpr,
    D: tl.constexpr, ROWS: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    row, live, sample, token, head = _rows_of_program(rows, tokens, heads, ROWS)
    x = _load_rows(
        image, text, image_sb, image_sn, text_sb, text_sn, sample, token, head, live, image_tokens, HAS_TEXT, D
    )
    if NORM:
        w = _load_weight(weight, text_weight, token, image_tokens, HAS_TEXT, D)
        scale = tl.rsqrt(tl.sum(x * x, 1) / D + EPS)
        if KEEP_RSTD:
            tl.store(rstd + row, scale, mask=live)
        x = x * scale[:, None] * w
        if ROTARY:
            x = _rotated(x, rotary, token, live, False, D, ROWS)
    tl.store(joint + (row * D)[:, None] + tl.arange(0, D)[None, :], x, mask=live[:, None])


@triton.jit
def forward_kernel(
    q, k, v, text_q, text_k, text_v, wq, wk, text_wq, text_wk, rotary, joint_q, joint_k, joint_v, rstd,
    rows, tokens, image_tokens, heads,
    q_sb, q_sn, k_sb, k_sn, v_sb, v_sn, text_q_sb, text_q_sn, text_k_sb, text_k_sn, text_v_sb, text_v_sn,
    KEEP_RSTD: tl.constexpr, HAS_TEXT: tl.constexpr, ROTARY: tl.constexpr,
    D: tl.constexpr, ROWS: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    which = tl.program_id(1)
    rstd_k = rstd + rows if KEEP_RSTD else rstd
    if which == 0:
        _write_joint(
            q, text_q, wq, text_wq, rotary, joint_q, rstd, rows, tokens, image_tokens, heads,
            q_sb, q_sn, text_q_sb, text_q_sn, True, KEEP_RSTD, HAS_TEXT, ROTARY, D, ROWS, EPS,
        )  # fmt: skip
    elif which == 1:
        _write_joint(
            k, text_k, wk, text_wk, rotary, joint_k, rstd_k, rows, tokens, image_tokens, heads,
            k_sb, k_sn, text_k_sb, text_k_sn, True, KEEP_RSTD, HAS_TEXT, ROTARY, D, ROWS, EPS,
        )  # fmt: skip
    elif HAS_TEXT:
        _write_joint(
            v, text_v, wq, text_wq, rotary, joint_v, rstd, rows, tokens, image_tokens, heads,
            v_sb, v_sn, text_v_sb, text_v_sn, False, False, HAS_TEXT, False, D, ROWS, EPS,
        )  # fmt: skip


@triton.jit
def _read_joint_gradient(
    grad, image, text, weight, text_weight, rotary, rstd, d_image, d_text, d_weight,
    rows, tokens, image_tokens, heads, grad_sb, grad_sn, grad_sh, image_sb, image_sn, text_sb, text_sn,
    NORM: tl.constexpr, FROM_OUTPUT: tl.constexpr, HAS_TEXT: tl.constexpr, WEIGHT_GRAD: tl.constexpr,
    ROTARY: tl.constexpr,
    D: tl.constexpr, ROWS: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, D)
    program = tl.program_id(0).to(tl.int64)
    row, live, sample, token, head = _rows_of_program(rows, tokens, heads, ROWS)
    from_image = token < image_tokens
    offset = sample * grad_sb + token * grad_sn + head * grad_sh
    g = tl.load(grad + offset[:, None] + column[None, :], mask=live[:, None], other=0.0).to(tl.float32)
    if NORM:
        if ROTARY:
            g = _rotated(g, rotary, token, live, True, D, ROWS)
        w = _load_weight(weight, text_weight, token, image_tokens, HAS_TEXT, D)
        if FROM_OUTPUT:
            y = tl.load(image + (row * D)[:, None] + column[None, :], mask=live[:, None], other=0.0).to(tl.float32)
            scale = tl.load(rstd + row, mask=live, other=0.0)[:, None]
            x = y / w
        else:
            x = _load_rows(
                image, text, image_sb, image_sn, text_sb, text_sn, sample, token, head, live, image_tokens, HAS_TEXT, D
            )
            scale = tl.rsqrt(tl.sum(x * x, 1) / D + EPS)[:, None]
            x = x * scale
        if WEIGHT_GRAD:
            # One row of sums a program, added up afterwards in the order of the programs: the same bits every time.
            of_weight = g * x
            sums = tl.sum(tl.where((live & from_image)[:, None], of_weight, 0.0), 0)
            tl.store(d_weight + program * 2 * D + column, sums)
            sums = tl.sum(tl.where((live & (token >= image_tokens))[:, None], of_weight, 0.0), 0)
            tl.store(d_weight + program * 2 * D + D + column, sums)
        g = g * w
        g = scale * (g - x * (tl.sum(g * x, 1) / D)[:, None])
    to_image = ((sample * image_tokens + token) * heads + head) * D
    tl.store(d_image + to_image[:, None] + column[None, :], g, mask=(live & from_image)[:, None])
    if HAS_TEXT:
        to_text = ((sample * (tokens - image_tokens) + token - image_tokens) * heads + head) * D
        tl.store(d_text + to_text[:, None] + column[None, :], g, mask=(live & (token >= image_tokens))[:, None])


@triton.jit
def backward_kernel(
    grad_q, grad_k, grad_v, q, k, text_q, text_k, wq, wk, text_wq, text_wk, rotary, rstd,
    d_q, d_k, d_v, d_text_q, d_text_k, d_text_v, d_wq, d_wk,
    rows, tokens, image_tokens, heads,
    grad_q_sb, grad_q_sn, grad_q_sh, grad_k_sb, grad_k_sn, grad_k_sh, grad_v_sb, grad_v_sn, grad_v_sh,
    q_sb, q_sn, k_sb, k_sn, text_q_sb, text_q_sn, text_k_sb, text_k_sn,
    FROM_OUTPUT: tl.constexpr, HAS_TEXT: tl.constexpr, WEIGHT_GRAD: tl.constexpr, ROTARY: tl.constexpr,
    D: tl.constexpr, ROWS: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    which = tl.program_id(1)
    rstd_k = rstd + rows if FROM_OUTPUT else rstd
    if which == 0:
        _read_joint_gradient(
            grad_q, q, text_q, wq, text_wq, rotary, rstd, d_q, d_text_q, d_wq, rows, tokens, image_tokens, heads,
            grad_q_sb, grad_q_sn, grad_q_sh, q_sb, q_sn, text_q_sb, text_q_sn,
            True, FROM_OUTPUT, HAS_TEXT, WEIGHT_GRAD, ROTARY, D, ROWS, EPS,
        )  # fmt: skip
    elif which == 1:
        _read_joint_gradient(
            grad_k, k, text_k, wk, text_wk, rotary, rstd_k, d_k, d_text_k, d_wk, rows, tokens, image_tokens, heads,
            grad_k_sb, grad_k_sn, grad_k_sh, k_sb, k_sn, text_k_sb, text_k_sn,
            True, FROM_OUTPUT, HAS_TEXT, WEIGHT_GRAD, ROTARY, D, ROWS, EPS,
        )  # fmt: skip
    elif HAS_TEXT:
        _read_joint_gradient(
            grad_v, q, text_q, wq, text_wq, rotary, rstd, d_v, d_text_v, d_wq, rows, tokens, image_tokens, heads,
            grad_v_sb, grad_v_sn, grad_v_sh, q_sb, q_sn, text_q_sb, text_q_sn,
            False, FROM_OUTPUT, HAS_TEXT, WEIGHT_GRAD, False, D, ROWS, EPS,
        )  # fmt: skip


_launch_forward, _launch_backward = Launcher(forward_kernel), Launcher(backward_kernel)


def forward(
    image: Sequence[Tensor],
    text: Sequence[Tensor],
    weights: Sequence[Tensor],
    rotary: Tensor | None,
    heads: int,
    eps: float,
    keep_rstd: bool,
) -> list[Tensor]:
    """Joint q, k (normalised) and, with text, v: ``[B, N + M, H, D]`` each.

    ``image`` is q and k, ``[B, N, H * D]``, and with text v; ``text`` is the same of the text, ``[B, M, H * D]``, or
    empty. ``weights``: those of q, k and, with text, of the text's q and k, ``[D]`` each. ``rotary``: cosines and
    sines, contiguous ``[N + M, D / 2, 2]``. With ``keep_rstd`` also the factors 1 / sqrt(mean(x^2) + eps), float32
    ``[2, B, N + M, H]``.
    """
    batch, image_tokens, width = image[0].shape
    tokens = image_tokens + (text[0].shape[1] if text else 0)
    joint = [tensor.new_empty(batch, tokens, heads, width // heads) for tensor in image]
    rows = batch * tokens * heads
    rstd = [image[0].new_empty((2, batch, tokens, heads), dtype=torch.float32)] if keep_rstd else []
    if rows:
        _launch_forward(
            (triton.cdiv(rows, ROWS), len(image), 1),
            (
                *padded(3, image), *padded(3, text), *padded(4, weights), rotary, *padded(3, joint),
                rstd[0] if rstd else None,
            ),
            (rows, tokens, image_tokens, heads, *strides(2, *padded(3, image), *padded(3, text))),
            # KEEP_RSTD, HAS_TEXT, ROTARY, D, ROWS, EPS
            (keep_rstd, bool(text), rotary is not None, int(width // heads), ROWS, eps),
            FORWARD_WARPS,
        )  # fmt: skip
    return joint + rstd


def backward(
    grads: Sequence[Tensor],
    image: Sequence[Tensor],
    text: Sequence[Tensor],
    weights: Sequence[Tensor],
    rotary: Tensor | None,
    rstd: Tensor | None,
    image_tokens: int,
    eps: float,
    weight_grad: bool,
) -> list[Tensor]:
    """Gradients of the image's q, k and, with text, v, then of the text's, then with ``weight_grad`` those of all
    weights, ``[2 or 4, D]`` in float32.

    ``grads``: one for each joint buffer, any strides but the last. ``image`` and ``text``: q and k alone; or, where
    ``rstd`` is given, ``image`` is what they became in the joint buffers and ``text`` is empty, without ``rotary``.
    """
    has_text = len(weights) == 4
    batch, tokens, heads, head_dim = grads[0].shape
    width = heads * head_dim
    d_image = [image[0].new_empty(batch, image_tokens, width) for _ in grads]
    d_text = [image[0].new_empty(batch, tokens - image_tokens, width) for _ in grads] if has_text else []
    rows = batch * tokens * heads
    programs = triton.cdiv(rows, ROWS)
    d_weights = [weights[0].new_empty((programs, 2, head_dim), dtype=torch.float32) for _ in image if weight_grad]
    if rows:
        _launch_backward(
            (programs, len(grads), 1),
            (
                *padded(3, grads), *image, *padded(2, text), *padded(4, weights), rotary, rstd,
                *padded(3, d_image), *padded(3, d_text), *padded(2, d_weights),
            ),
            (
                rows, tokens, image_tokens, heads,
                *strides(3, *padded(3, grads)), *strides(2, *image, *padded(2, text)),
            ),
            # FROM_OUTPUT, HAS_TEXT, WEIGHT_GRAD, ROTARY, D, ROWS, EPS
            (rstd is not None, has_text, weight_grad, rotary is not None, int(head_dim), ROWS, eps),
            BACKWARD_WARPS,
        )  # fmt: skip
    found: list[Tensor] = [*d_image, *d_text]
    if weight_grad:
        sums = torch.stack([partial.sum(0) for partial in d_weights], 1)  # [image or text, q or k, D]
        found.append(sums.flatten(0, 1)[: len(weights)].contiguous())
    return found
