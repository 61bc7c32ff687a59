"""Statistics of softmax(hidden @ weight.T) a token, and their gradient, without the logits of more than a few tokens.

Logits are made for a part of one sequence at a time, by one product of matrices, and made again for the gradient. A
sequence never shares a product with another one, so that its bits depend on nothing else in the batch.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from advflow_ext.contract.checks import accumulate_dtype
from advflow_ext.kernels import triton_ops

PART = 2**22  # logits at once, 16 MiB of float32: a sequence of 256 tokens with a vocabulary of 16384


class Head:
    """``weight`` ``[V, H]``, ready to meet many hidden states."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        # A GPU adds products of bfloat16 up in float32. Those of float16 would lose gradients below 6e-8.
        self._narrow = weight.is_cuda and weight.dtype == torch.bfloat16 and dtype == torch.float32
        self.weight = weight if self._narrow else weight.to(dtype)

    @property
    def dtype(self) -> torch.dtype:
        """Of what a product takes."""
        return self.weight.dtype

    def product(self, left: Tensor, right: Tensor) -> Tensor:
        """Of two matrices of :attr:`dtype`, in the accumulate dtype."""
        return torch.mm(left, right, out_dtype=torch.float32) if self._narrow else left @ right

    def logits(self, hidden: Tensor) -> Tensor:
        return self.product(hidden.to(self.dtype), self.weight.T)


def parts_of(hidden: Tensor, weight: Tensor) -> Iterator[tuple[int, slice]]:
    """Sequences, and which of their tokens come at once: as equal a number as can be."""
    batch, tokens, _ = hidden.shape
    count = -(-tokens // max(1, PART // weight.shape[0]))
    size = -(-tokens // count)
    for sequence in range(batch):
        for start in range(0, tokens, size):
            yield sequence, slice(start, start + size)


def rows_for(logits: Tensor) -> Any:
    """Who looks at the logits: Triton where it serves, PyTorch elsewhere."""
    name = "softmax_rows_triton" if triton_ops.serves(logits) else "softmax_rows"
    return importlib.import_module(f"advflow_ext.kernels.{name}")


@torch.no_grad()
def token_statistics(
    hidden: Tensor, weight: Tensor, tokens: Tensor, hidden_ref: Tensor | None, weight_ref: Tensor | None
) -> list[Tensor]:
    """Log-probability of the token, entropy, KL to the reference's distribution and what the gradient needs beside
    them, ``[B, T]``, ``[B, T]``, ``[B, T]`` or ``[0]``, and ``[2 or 4, B, T]``: the largest logit, and the sum of
    exponentials over that of it; then those of the reference."""
    dtype = accumulate_dtype(hidden, weight, hidden_ref, weight_ref)
    found = _statistics_shapes(hidden, weight, tokens, hidden_ref, weight_ref)
    log_prob, entropy, kl, state = found
    with torch.autocast(hidden.device.type, enabled=False):
        head = Head(weight, dtype)
        ref = None if hidden_ref is None or weight_ref is None else (hidden_ref, Head(weight_ref, dtype))
        for b, part in parts_of(hidden, weight):
            logits = head.logits(hidden[b, part])
            others = None if ref is None else ref[1].logits(ref[0][b, part])
            of_kl = None if ref is None else kl[b, part]
            rows_for(logits).statistics(
                logits, others, tokens[b, part], log_prob[b, part], entropy[b, part], of_kl, state[:, b, part]
            )
    return found


@torch.no_grad()
def token_gradients(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    hidden_ref: Tensor | None,
    weight_ref: Tensor | None,
    entropy: Tensor,
    kl: Tensor,
    state: Tensor,
    d_log_prob: Tensor,
    d_entropy: Tensor | None,
    d_kl: Tensor | None,
    of_hidden: bool,
    of_weight: bool,
) -> list[Tensor]:
    """Gradients of hidden and weight, ``[0]`` for what is not asked for. Nothing is read of a token whose own are 0."""
    dtype = accumulate_dtype(hidden, weight, hidden_ref, weight_ref)
    d_hidden = hidden.new_empty(hidden.shape if of_hidden else 0)
    d_weight = weight.new_zeros(weight.shape if of_weight else 0, dtype=dtype)
    given = [each for each in (d_log_prob, d_entropy, d_kl) if each is not None]
    live = (torch.stack(given) != 0).any(0)
    upstream = [None if each is None else each.contiguous() for each in (d_log_prob, d_entropy, d_kl)]
    with torch.autocast(hidden.device.type, enabled=False):
        head = Head(weight, dtype)
        ref = None
        if d_kl is not None and hidden_ref is not None and weight_ref is not None:
            ref = hidden_ref, Head(weight_ref, dtype)
        for b, part in parts_of(hidden, weight):
            rows = live[b, part, None]
            states = torch.where(rows, hidden[b, part], 0).to(head.dtype)
            logits = head.logits(states)
            others = None if ref is None else ref[1].logits(torch.where(rows, ref[0][b, part], 0))
            incoming = [None if each is None else each[b, part] for each in upstream]
            d_logits = rows_for(logits).gradient(
                logits, others, tokens[b, part], entropy[b, part], kl[b, part] if ref else None, state[:, b, part],
                *incoming, rows[:, 0], head.dtype,
            )  # fmt: skip
            if of_hidden:
                d_hidden[b, part] = torch.where(rows, head.product(d_logits, head.weight), 0)
            if of_weight and d_logits.dtype == d_weight.dtype:
                d_weight.addmm_(d_logits.T, states)
            elif of_weight:
                d_weight += head.product(d_logits.T, states)
    return [d_hidden, d_weight.to(weight.dtype)]


def _statistics_shapes(
    hidden: Tensor, weight: Tensor, tokens: Tensor, hidden_ref: Tensor | None, weight_ref: Tensor | None
) -> list[Tensor]:
    each = hidden.shape[:2]
    dtype = accumulate_dtype(hidden, weight, hidden_ref, weight_ref)
    shapes = (each, each, (0,), (2, *each)) if hidden_ref is None else (each, each, each, (4, *each))
    return [hidden.new_empty(shape, dtype=dtype) for shape in shapes]


def _gradient_shapes(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    hidden_ref: Tensor | None,
    weight_ref: Tensor | None,
    entropy: Tensor,
    kl: Tensor,
    state: Tensor,
    d_log_prob: Tensor,
    d_entropy: Tensor | None,
    d_kl: Tensor | None,
    of_hidden: bool,
    of_weight: bool,
) -> list[Tensor]:
    return [hidden.new_empty(hidden.shape if of_hidden else 0), weight.new_empty(weight.shape if of_weight else 0)]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    _, entropy, kl, state = output
    ctx.save_for_backward(*inputs, entropy, kl, state)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grads: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # once: under gradient checkpointing each look at it is a recomputation
    d_log_prob, d_entropy, d_kl, _ = grads
    if d_log_prob is None:
        d_log_prob = torch.zeros_like(saved[5])
    if saved[3] is None:  # no reference: of its column, which is empty
        d_kl = None
    asked = ctx.needs_input_grad[:2]
    d_hidden, d_weight = torch.ops.advflow.token_gradients(*saved, d_log_prob, d_entropy, d_kl, *asked)
    return d_hidden if asked[0] else None, d_weight if asked[1] else None, None, None, None


def _refuse(ctx: Any, *grads: Any) -> None:
    raise RuntimeError(
        "token_policy_loss and token_log_prob have one derivative, and a second is asked for; those of "
        "advflow_ext.reference have both."
    )


def _define(schema: str, run: Callable[..., list[Tensor]], shapes: Callable[..., list[Tensor]]) -> None:
    library = triton_ops.library
    library.define(schema)
    name = f"advflow::{schema.partition('(')[0]}"
    library.impl(name, run, "CPU")
    library.impl(name, triton_ops.on_device_of_tensors(run), "CUDA")
    torch.library.register_fake(name, shapes, lib=library)


_define(
    "token_statistics(Tensor hidden, Tensor weight, Tensor tokens, Tensor? hidden_ref, Tensor? weight_ref) -> Tensor[]",
    token_statistics,
    _statistics_shapes,
)
_define(
    "token_gradients(Tensor hidden, Tensor weight, Tensor tokens, Tensor? hidden_ref, Tensor? weight_ref, "
    "Tensor entropy, Tensor kl, Tensor state, Tensor d_log_prob, Tensor? d_entropy, Tensor? d_kl, bool of_hidden, "
    "bool of_weight) -> Tensor[]",
    token_gradients,
    _gradient_shapes,
)
torch.library.register_autograd(
    "advflow::token_statistics", _differentiate, setup_context=_keep, lib=triton_ops.library
)
torch.library.register_autograd("advflow::token_gradients", _refuse, lib=triton_ops.library)
