"""Linear layers that read one input, as the projections of a token stream do: LoRA layers and plain ones, together."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from advflow_ext.nn.lora import (
    Adapter,
    active_adapters,
    autocasts,
    compute_dtype,
    flattened,
    has_hooks,
    is_lora_layer,
    lora_obstacle,
    weight_gradient,
    with_product,
)


def joint_lora_forward(layers: Sequence[nn.Module], x: Tensor) -> list[Tensor]:
    """What each of ``layers`` gives for ``x`` ``[..., in]``: PEFT's LoRA ``Linear`` s and torch's own, frozen.

    As :func:`advflow_ext.nn.lora_forward` computes them, with one product of ``x`` with every A. Backward, the gradient
    of ``x`` is one tensor, to which each product is added as it is made, and those of every A are one product: autograd
    adds nothing up, and ``x`` is read once for them.

    The layers are called one by one, by their own forward, where one of them has hooks, an obstacle
    (:func:`advflow_ext.nn.lora_obstacle`), a base that trains, a dtype of its own or a tensor of another class (a
    DTensor), and where nothing is to be gained, without an adapter and a gradient. Nothing else depends on whether a
    gradient is asked for: the same numbers come out with and without.
    """
    adapters = None if is_traceable_wrapper_subclass(x) else _joint_adapters(layers, x)
    if adapters is None:
        return [layer(x) for layer in layers]
    bases: list[Any] = [layer.base_layer if is_lora_layer(layer) else layer for layer in layers]
    dtype = compute_dtype(x)
    tensors = [base.weight for base in bases] + [base.bias for base in bases]
    tensors += [matrix for _, adapter in adapters for matrix in (adapter.a, adapter.b)]
    of, scales = tuple(layer for layer, _ in adapters), tuple(adapter.scale for _, adapter in adapters)
    differentiated = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *tensors))
    if not adapters and not differentiated:
        return [layer(x) for layer in layers]
    x = x.to(dtype)
    # Dynamo cannot trace a Function of this signature where no gradient is asked for.
    if differentiated:
        return list(_JointLora.apply(x, dtype, of, scales, *tensors))
    weights, biases = tensors[: len(layers)], tensors[len(layers) : 2 * len(layers)]
    return _outputs(x, weights, biases, dtype, of, scales, *_packed(tensors[2 * len(layers) :], dtype))[0]


def _joint_adapters(layers: Sequence[nn.Module], x: Tensor) -> list[tuple[int, Adapter]] | None:
    """Every active adapter with the number of its layer; None where the layers have to be called one by one."""
    found: list[tuple[int, Adapter]] = []
    for number, layer in enumerate(layers):
        if "forward" in layer.__dict__ or has_hooks(layer):
            return None
        base: Any = layer
        if is_lora_layer(layer):
            if lora_obstacle(layer) is not None:
                return None
            base = layer.base_layer
            if not layer.disable_adapters:
                found += [(number, adapter) for adapter in active_adapters(layer)]
        elif type(layer) is not nn.Linear:
            return None
        if any(t.requires_grad or is_traceable_wrapper_subclass(t) for t in (base.weight, base.bias) if t is not None):
            return None
        if base.weight.dtype != x.dtype and not autocasts(x):
            return None
    if any(is_traceable_wrapper_subclass(matrix) for _, adapter in found for matrix in (adapter.a, adapter.b)):
        return None
    return found


def _packed(adapters: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor | None, list[Tensor]]:
    """Every A, one below the other, and each B, all in ``dtype``: made in one launch, or in two if they are cast."""
    if not adapters:
        return None, []
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
        F.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype)).contiguous()
        for weight, bias in zip(weights, biases, strict=True)
    ]
    if a is None:
        return outs, None
    common, own = _split(scales)
    flat = flattened(x)
    products = _scaled(flat, a.t(), common, flat.new_empty(flat.shape[0], a.shape[0]))
    for layer, part, matrix, scale in zip(of, products.split(_ranks(b), 1), b, own, strict=True):
        outs[layer] = with_product(outs[layer], part, matrix.t(), scale)
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


class _JointLora(torch.autograd.Function):
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
        shape, of_outs = grads[0].shape[:-1], [flattened(grad) for grad in grads]
        inner = None
        if a is not None and (weights or x is not None):
            inner = _inner(of_outs, ctx.of, ctx.scales, b)
        grad_x = None
        if weights:
            grad_x = of_outs[0] @ weights[0].to(ctx.dtype)
            for grad, weight in zip(of_outs[1:], weights[1:], strict=True):
                grad_x = with_product(grad_x, grad, weight.to(ctx.dtype), 1.0)
            if inner is not None:
                grad_x = with_product(grad_x, inner, a, 1.0)
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
        of_a = weight_gradient(inner, flattened(x), 1.0, widest).split(ranks)
        for pair, part in enumerate(of_a):
            if needs[2 * pair]:
                grads[2 * pair] = part.to(ctx.adapter_dtypes[2 * pair])
    if products is not None:
        _, own = _split(ctx.scales)
        for pair, (layer, part) in enumerate(zip(ctx.of, products.split(ranks, 1), strict=True)):
            if needs[2 * pair + 1]:
                dtype = ctx.adapter_dtypes[2 * pair + 1]
                grads[2 * pair + 1] = weight_gradient(of_outs[layer], part, own[pair], dtype)
    return grads
