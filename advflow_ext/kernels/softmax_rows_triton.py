"""What :mod:`advflow_ext.kernels.softmax_rows` computes, in one launch for the statistics and one for the gradient.

Statistics: a program a row, which it reads twice, for the largest logit and for the sums; what a product of matrices
has just written is in the cache. Gradient: a program for each block of a row. A row's bits depend on that row alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from advflow_ext.kernels.launch import Launcher

BLOCK = 2048
STATISTICS_WARPS = 8
GRADIENT_WARPS = 8


@triton.jit
def statistics_kernel(
    logits, others, targets, log_prob, entropy, kl, state, vocabulary, logits_sn, others_sn, state_s0,
    HAS_REF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * logits_sn
    column = tl.arange(0, BLOCK)
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    other_top = tl.full((BLOCK,), float("-inf"), tl.float32)
    if HAS_REF:
        others += row * others_sn
    for start in range(0, vocabulary, BLOCK):
        inside = start + column < vocabulary
        top = tl.maximum(top, tl.load(logits + start + column, mask=inside, other=float("-inf")))
        if HAS_REF:
            other_top = tl.maximum(other_top, tl.load(others + start + column, mask=inside, other=float("-inf")))
    largest, other_largest = tl.max(top, 0), tl.max(other_top, 0)
    weights = tl.zeros((BLOCK,), tl.float32)
    other_weights = tl.zeros((BLOCK,), tl.float32)
    weighted = tl.zeros((BLOCK,), tl.float32)
    difference = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        inside = start + column < vocabulary
        z = tl.load(logits + start + column, mask=inside, other=0.0) - largest
        weight = tl.where(inside, tl.exp(z), 0.0)
        weights += weight
        weighted += weight * z
        if HAS_REF:
            other = tl.load(others + start + column, mask=inside, other=0.0) - other_largest
            other_weights += tl.where(inside, tl.exp(other), 0.0)
            difference += weight * (other - z)
    total = tl.sum(weights, 0)
    log_total = tl.log(total)
    chosen = tl.load(logits + tl.load(targets + row)) - largest
    tl.store(log_prob + row, chosen - log_total)
    tl.store(entropy + row, log_total - tl.sum(weighted, 0) / total)
    tl.store(state + row, largest)
    tl.store(state + state_s0 + row, total)
    if HAS_REF:
        other_total = tl.sum(other_weights, 0)
        tl.store(kl + row, tl.log(other_total) - log_total - tl.sum(difference, 0) / total)
        tl.store(state + 2 * state_s0 + row, other_largest)
        tl.store(state + 3 * state_s0 + row, other_total)


@triton.jit
def gradient_kernel(
    logits, others, result, targets, entropy, kl, state, of_log_prob, of_entropy, of_kl, live,
    vocabulary, logits_sn, others_sn, result_sn, state_s0,
    HAS_ENTROPY: tl.constexpr, HAS_REF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < vocabulary
    a = tl.load(of_log_prob + row)
    total = tl.load(state + state_s0 + row)
    log_total = tl.log(total)
    z = tl.load(logits + row * logits_sn + column, mask=inside, other=0.0) - tl.load(state + row)
    p = tl.exp(z) / total
    inner = tl.zeros((BLOCK,), tl.float32) - a
    if HAS_ENTROPY:
        inner -= tl.load(of_entropy + row) * (z + tl.load(entropy + row) - log_total)
    if HAS_REF:
        other = tl.load(others + row * others_sn + column, mask=inside, other=0.0) - tl.load(state + 2 * state_s0 + row)
        shift = tl.log(tl.load(state + 3 * state_s0 + row)) - log_total - tl.load(kl + row)
        inner += tl.load(of_kl + row) * (z - other + shift)
    gradient = p * inner + tl.where(column == tl.load(targets + row), a, 0.0)
    gradient = tl.where(tl.load(live + row) != 0, gradient, 0.0)
    tl.store(result + row * result_sn + column, gradient, mask=inside)


_launch_statistics, _launch_gradient = Launcher(statistics_kernel), Launcher(gradient_kernel)


def statistics(
    logits: Tensor,
    others: Tensor | None,
    tokens: Tensor,
    log_prob: Tensor,
    entropy: Tensor,
    kl: Tensor | None,
    state: Tensor,
) -> None:
    rows, vocabulary = logits.shape
    _launch_statistics(
        (rows, 1, 1),
        (logits, others, tokens, log_prob, entropy, kl, state),
        (vocabulary, logits.stride(0), 0 if others is None else others.stride(0), state.stride(0)),
        (others is not None, BLOCK),
        STATISTICS_WARPS,
    )


def gradient(
    logits: Tensor,
    others: Tensor | None,
    tokens: Tensor,
    entropy: Tensor,
    kl: Tensor | None,
    state: Tensor,
    a: Tensor,
    b: Tensor | None,
    k: Tensor | None,
    live: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    rows, vocabulary = logits.shape
    result = logits if dtype == logits.dtype else torch.empty_like(logits, dtype=dtype)
    _launch_gradient(
        (rows, triton.cdiv(vocabulary, BLOCK), 1),
        (logits, others, result, tokens, entropy, kl, state, a, b, k, live),
        (vocabulary, logits.stride(0), 0 if others is None else others.stride(0), result.stride(0), state.stride(0)),
        (b is not None, others is not None, BLOCK),
        GRADIENT_WARPS,
    )
    return result
