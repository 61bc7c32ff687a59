"""Linear layers of one input with low-rank adapters, made of matrix products alone: one layer, or all that read it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class Adapter(NamedTuple):
    """One low-rank term ``scale (x A^T) B^T``: ``a`` is ``[r, in]``, ``b`` is ``[out, r]``."""

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
    common, own = _split(scales)
    flat = _flat(x)
    products = _scaled(flat, a.t(), common, flat.new_empty(flat.shape[0], a.shape[0]))
    for layer, part, matrix, scale in zip(of, products.split(_ranks(b), 1), b, own, strict=True):
        # Made contiguous for that alone: of an output that is a view torch 2.11, traced, takes the gradient for 0.
        outs[layer] = _with_product(outs[layer].contiguous(), part, matrix.t(), scale)
    return outs, products


def _split(scales: tuple[float, ...]) -> tuple[float, list[float]]:
    """What the one product with every A takes of the scales, and what it leaves to each B: 1 where they are alike."""
    if all(scale == scales[0] for scale in scales):
        return scales[0], [1.0] * len(scales)
    return 1.0, list(scales)


def _ranks(b: list[Tensor]) -> list[int]:
    return [matrix.shape[1] for matrix in b]


def _scaled(left: Tensor, right: Tensor, scale: float, out: Tensor) -> Tensor:
    """``scale left right``, rounded once, in ``out`` where a call is a call."""
    if torch.compiler.is_compiling():
        return torch.addmm(left.new_zeros(()), left, right, alpha=scale)
    return out.addmm_(left, right, beta=0, alpha=scale)


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
        ctx.adapter_dtypes = [adapter.dtype for adapter in adapters]
        return tuple(outs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, products, a, *rest = ctx.saved_tensors
        b, weights = rest[: len(ctx.of)], rest[len(ctx.of) :]
        shape, of_outs = grads[0].shape[:-1], [_flat(grad) for grad in grads]
        inner = None
        if a is not None and (weights or x is not None):
            inner = _inner(of_outs, ctx.of, ctx.scales, b)
        grad_x = None
        if weights:
            grad_x = of_outs[0] @ weights[0].to(ctx.dtype)
            for grad, weight in zip(of_outs[1:], weights[1:], strict=True):
                grad_x = _with_product(grad_x, grad, weight.to(ctx.dtype), 1.0)
            if inner is not None:
                grad_x = _with_product(grad_x, inner, a, 1.0)
            grad_x = grad_x.view(*shape, grad_x.shape[-1])
        of_adapters = _adapter_gradients(ctx, of_outs, inner, x, products, _ranks(b))
        return grad_x, None, None, None, *[None] * 2 * len(grads), *of_adapters


def _inner(of_outs: list[Tensor], of: tuple[int, ...], scales: tuple[float, ...], b: list[Tensor]) -> Tensor:
    """The gradient of ``x A^T`` for every A, side by side as the A are one below the other."""
    inner = of_outs[0].new_empty(of_outs[0].shape[0], sum(_ranks(b)))
    parts = [
        _scaled(of_outs[layer], matrix, scale, part)
        for layer, scale, matrix, part in zip(of, scales, b, inner.split(_ranks(b), 1), strict=True)
    ]
    return torch.cat(parts, 1) if torch.compiler.is_compiling() else inner


def _adapter_gradients(
    ctx: Any,
    of_outs: list[Tensor],
    inner: Tensor | None,
    x: Tensor | None,
    products: Tensor | None,
    ranks: list[int],
) -> list[Tensor | None]:
    """Of a_1, b_1, a_2, b_2, ..."""
    grads: list[Tensor | None] = [None for _ in range(2 * len(ranks))]
    needs = ctx.needs_input_grad[-len(grads) :] if grads else ()
    if inner is not None and x is not None:
        widest = functools.reduce(torch.promote_types, ctx.adapter_dtypes[::2])
        of_a = _weight_gradient(inner, _flat(x), 1.0, widest).split(ranks)
        for pair, part in enumerate(of_a):
            if needs[2 * pair]:
                grads[2 * pair] = part.to(ctx.adapter_dtypes[2 * pair])
    if products is not None:
        _, own = _split(ctx.scales)
        for pair, (layer, part) in enumerate(zip(ctx.of, products.split(ranks, 1), strict=True)):
            if needs[2 * pair + 1]:
                dtype = ctx.adapter_dtypes[2 * pair + 1]
                grads[2 * pair + 1] = _weight_gradient(of_outs[layer], part, own[pair], dtype)
    return grads


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


def _weight_gradient(left: Tensor, right: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """``scale left^T right`` in ``dtype``, never rounded in between to less where the device can do so."""
    if left.is_cuda and left.dtype in (torch.bfloat16, torch.float16):
        product = torch.mm(left.t(), right, out_dtype=torch.float32)
    else:
        product = torch.mm(left.t(), right).to(torch.promote_types(left.dtype, dtype))
    return (product if scale == 1 else product.mul_(scale)).to(dtype)
