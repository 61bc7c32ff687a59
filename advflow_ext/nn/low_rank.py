"""Linear layers of one input with low-rank adapters, made of matrix products alone: one layer, or all that read it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class Adapter(NamedTuple):
    """One low-rank term ``scale (x A^T) B^T``: ``a`` is ``[r, in]``, ``b`` is ``[out, r]``.

    Or ``[B, r, in]`` and ``[B, out, r]``, each expanded over the B samples of ``x``, so that the gradient of every
    sample is its own. What such matrices hold is read for the first sample alone.
    """

    a: Tensor
    b: Tensor
    scale: float


class Base(NamedTuple):
    """A linear layer without adapters: ``weight`` is ``[out, in]``."""

    weight: Tensor
    bias: Tensor | None


def low_rank_linears(
    x: Tensor, bases: Sequence[Base], adapters: Sequence[tuple[int, Adapter]], dtype: torch.dtype
) -> list[Tensor]:
    """What each of the frozen ``bases`` gives for ``x`` ``[..., in]``, computed in ``dtype``.

    Each of the ``adapters`` comes with the number of its base.
    """
    x = x.to(dtype)
    for matrix in (matrix for _, adapter in adapters for matrix in (adapter.a, adapter.b)):
        if matrix.dim() == 3 and len(matrix) != len(x):
            raise ValueError(f"an adapter is expanded over {len(matrix)} samples; accepted are those of x, {len(x)}.")
    weights, biases = [base.weight for base in bases], [base.bias for base in bases]
    matrices = [matrix for _, adapter in adapters for matrix in (adapter.a, adapter.b)]
    of, scales = tuple(number for number, _ in adapters), tuple(adapter.scale for _, adapter in adapters)
    # Dynamo cannot trace a Function of this signature where no gradient is asked for.
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *matrices)):
        return list(_LowRankLinears.apply(x, dtype, of, scales, *weights, *biases, *matrices))
    return _outputs(x, weights, biases, dtype, of, scales, *_packed(matrices, dtype))[0]


def _packed(adapters: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor | None, list[Tensor]]:
    """Every A, one below the other, and each B, all in ``dtype``: made in one launch, or in two if they are cast."""
    if not adapters:
        return None, []
    adapters = [matrix[0] if matrix.dim() == 3 else matrix for matrix in adapters]
    if len(adapters) == 2:
        return adapters[0].to(dtype), [adapters[1].to(dtype)]
    of_a, of_b = adapters[::2], adapters[1::2]
    flat = torch.cat([matrix.reshape(-1) for matrix in (*of_a, *of_b)]).to(dtype)
    a, *b = flat.split([sum(a.numel() for a in of_a), *(b.numel() for b in of_b)])
    return a.view(-1, of_a[0].shape[1]), [part.view(like.shape) for part, like in zip(b, of_b, strict=True)]


def _outputs(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    dtype: torch.dtype,
    of: tuple[int, ...],
    scales: tuple[float, ...],
    a: Tensor | None,
    b: list[Tensor],
) -> tuple[list[Tensor], Tensor | None]:
    """The layers' outputs, and the product of ``x`` with every A, ``[N, sum of ranks]``."""
    outs = [
        # In the shape given, so that each is the base layer's own product to the bit.
        F.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))
        for weight, bias in zip(weights, biases, strict=True)
    ]
    if a is None:
        return outs, None
    # Without the scales: in float16 theirs may be the factor that makes it overflow, and it would round otherwise.
    products = _flat(x) @ a.t()
    for layer, part, matrix, scale in zip(of, products.split(_ranks(b), 1), b, scales, strict=True):
        # Made contiguous for that alone: of an output that is a view torch 2.11, traced, takes the gradient for 0.
        outs[layer] = _with_product(outs[layer].contiguous(), part, matrix.t(), scale)
    return outs, products


def _ranks(b: list[Tensor]) -> list[int]:
    return [matrix.shape[1] for matrix in b]


class _LowRankLinears(torch.autograd.Function):
    """``x`` ``[..., in]`` in ``dtype``; ``tensors`` are weights, biases, a_1, b_1, a_2, b_2, ...

    The adapter of number i belongs to layer ``of[i]`` and has ``scales[i]``.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dtype: torch.dtype, of: tuple[int, ...], scales: tuple[float, ...], *tensors: Any
    ) -> tuple[Tensor, ...]:
        layers = len(tensors) // 2 - len(of)
        weights, biases, adapters = tensors[:layers], tensors[layers : 2 * layers], tensors[2 * layers :]
        a, b = _packed(adapters, dtype)
        outs, products = _outputs(x, weights, biases, dtype, of, scales, a, b)
        needs_x, needs = ctx.needs_input_grad[0], ctx.needs_input_grad[4 + 2 * layers :]
        kept_x, kept_products = x if any(needs[::2]) else None, products if any(needs[1::2]) else None
        # The weights are saved by reference and cast again in the backward pass; the adapters are small.
        ctx.save_for_backward(kept_x, kept_products, a, *b, *(weights if needs_x else ()))
        ctx.dtype, ctx.of, ctx.scales = dtype, of, scales
        ctx.set_materialize_grads(False)  # an output that nobody used costs no product
        ctx.adapter_dtypes = [adapter.dtype for adapter in adapters]
        ctx.samples = len(x) if any(adapter.dim() == 3 for adapter in adapters) else None
        return tuple(outs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, products, a, *rest = ctx.saved_tensors
        b, weights = rest[: len(ctx.of)], rest[len(ctx.of) :]
        of_outs = {layer: _flat(grad) for layer, grad in enumerate(grads) if grad is not None}
        terms = [
            _Term(number, of_outs[layer], *of_pair)
            for number, (layer, *of_pair) in enumerate(zip(ctx.of, b, ctx.scales, strict=True))
            if layer in of_outs
        ]
        inner = _inner(terms) if terms and (weights or x is not None) else None
        grad_x: Tensor | None = None
        if weights and of_outs:
            first, *others = of_outs
            total = of_outs[first] @ weights[first].to(ctx.dtype)
            for layer in others:
                total = _with_product(total, of_outs[layer], weights[layer].to(ctx.dtype), 1.0)
            if inner is not None:
                total = _with_low_rank(total, inner, _of_terms(a, b, terms), terms)
            shape = next(grad.shape[:-1] for grad in grads if grad is not None)
            grad_x = total.view(*shape, total.shape[-1])
        of_adapters = _adapter_gradients(ctx, terms, inner, x, products, _ranks(b))
        return grad_x, None, None, None, *[None] * 2 * len(grads), *of_adapters


class _Term(NamedTuple):
    """Of an adapter, backward: its number, the gradient of its layer's output ``[N, out]``, its B and its scale."""

    number: int
    grad: Tensor
    b: Tensor
    scale: float


def _inner(terms: list[_Term]) -> Tensor:
    """The gradient of ``scale (x A^T)`` for every A, side by side as the A are one below the other."""
    if torch.compiler.is_compiling():
        return torch.cat([term.grad @ term.b for term in terms], 1)
    ranks = _ranks([term.b for term in terms])
    inner = terms[0].grad.new_empty(terms[0].grad.shape[0], sum(ranks))
    for term, part in zip(terms, inner.split(ranks, 1), strict=True):
        part.addmm_(term.grad, term.b, beta=0)
    return inner


def _of_terms(a: Tensor, b: list[Tensor], terms: list[_Term]) -> Tensor:
    """Of every A, one below the other, those of ``terms``."""
    if len(terms) == len(b):
        return a
    parts = a.split(_ranks(b))
    return torch.cat([parts[term.number] for term in terms])


def _with_low_rank(grad_x: Tensor, inner: Tensor, a: Tensor, terms: list[_Term]) -> Tensor:
    """``grad_x`` and every ``scale inner A``: one product for neighbours of one scale, as it is the product's own."""
    scales: list[float] = []
    widths: list[int] = []
    for term in terms:
        if scales and scales[-1] == term.scale:
            widths[-1] += term.b.shape[1]
        else:
            scales.append(term.scale)
            widths.append(term.b.shape[1])
    for scale, part, rows in zip(scales, inner.split(widths, 1), a.split(widths), strict=True):
        grad_x = _with_product(grad_x, part, rows, scale)
    return grad_x


def _adapter_gradients(
    ctx: Any, terms: list[_Term], inner: Tensor | None, x: Tensor | None, products: Tensor | None, ranks: list[int]
) -> list[Tensor | None]:
    """Of a_1, b_1, a_2, b_2, ..., of each sample where they are expanded."""
    needs = ctx.needs_input_grad[len(ctx.needs_input_grad) - 2 * len(ranks) :]
    unscaled: dict[int, Tensor] = {}
    if inner is not None and x is not None:
        widest = functools.reduce(torch.promote_types, ctx.adapter_dtypes[::2])
        of_a = _weight_gradient(inner, _flat(x), widest, ctx.samples).split(_ranks([term.b for term in terms]), -2)
        unscaled |= {2 * term.number: part for term, part in zip(terms, of_a, strict=True) if needs[2 * term.number]}
    if products is not None:
        of_products = products.split(ranks, 1)
        for number, grad, _, _ in terms:
            if needs[2 * number + 1]:
                dtype = ctx.adapter_dtypes[2 * number + 1]
                unscaled[2 * number + 1] = _weight_gradient(grad, of_products[number], dtype, ctx.samples)
    scaled = _times(list(unscaled.values()), [ctx.scales[place // 2] for place in unscaled])
    grads: list[Tensor | None] = [None for _ in range(2 * len(ranks))]
    for place, grad in zip(unscaled, scaled, strict=True):
        grads[place] = grad.to(ctx.adapter_dtypes[place])
    return grads


def _times(tensors: list[Tensor], factors: list[float]) -> list[Tensor]:
    """Each in a memory of its own, in one launch: what becomes a ``.grad`` is freed and saved without the others."""
    if not tensors:
        return []
    if torch.compiler.is_compiling():
        return list(torch._foreach_mul(tensors, factors))
    try:
        return list(torch._foreach_mul(tensors, factors))
    except RuntimeError:  # for the batched tensors of autograd's is_grads_batched it has no rule
        return [tensor * factor for tensor, factor in zip(tensors, factors, strict=True)]


def _with_product(to: Tensor, left: Tensor, right: Tensor, scale: float) -> Tensor:
    """``to + scale left right``, in place where a call is a call.

    Traced, torch 2.11 takes an output changed through a view for one without a gradient: every gradient would be 0.
    """
    rows = to.view(-1, to.shape[-1])
    if torch.compiler.is_compiling():
        return torch.addmm(rows, left, right, alpha=scale).view(to.shape)
    rows.addmm_(left, right, alpha=scale)
    return to


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _weight_gradient(left: Tensor, right: Tensor, dtype: torch.dtype, samples: int | None) -> Tensor:
    """``left^T right``, of each of so many ``samples`` or of all rows, in ``dtype`` or wider.

    Never rounded in between to less where the device can do so.
    """
    product: Callable[..., Tensor] = torch.mm
    if samples is not None:
        product = torch.bmm
        left, right = (rows.view(samples, -1, rows.shape[-1]) for rows in (left, right))
    if left.is_cuda and left.dtype in (torch.bfloat16, torch.float16):
        return product(left.mT, right, out_dtype=torch.float32)
    return product(left.mT, right).to(torch.promote_types(left.dtype, dtype))
