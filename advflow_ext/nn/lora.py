"""Low-rank adapters on frozen linear layers: a training form made of matrix products alone, and merged weights.

PEFT's layers are recognised by what they hold (``lora_A``, ``lora_B``, ``scaling``, ``base_layer``, ...); PEFT itself
is never imported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from advflow_ext.nn._identity import is_peft_linear
from advflow_ext.nn._stamp import stamp
from advflow_ext.reference.lora_linear import lora_linear_arguments

PeftLayer = Any  # an nn.Module that `is_lora_layer`; what such a module holds is known by its names alone


class Adapter(NamedTuple):
    """One low-rank term ``scale (x A^T) B^T``: ``a`` is ``[r, in]``, ``b`` is ``[out, r]``."""

    a: Tensor
    b: Tensor
    scale: float


def _products(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    scales: tuple[float, ...],
    adapters: Sequence[Tensor],
) -> tuple[Tensor, list[Tensor]]:
    """The layer's output ``[..., out]``, and every ``x A^T`` ``[N, r]`` on the way; ``adapters`` are in ``dtype``."""
    # In the shape given, so that it is the base layer's own product to the bit.
    out = F.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype)).contiguous()
    flat = flattened(x)
    products = []
    for a, b, scale in zip(adapters[::2], adapters[1::2], scales, strict=True):
        products.append(flat @ a.t())
        out = with_product(out, products[-1], b.t(), scale)
    return out, products


def with_product(to: Tensor, left: Tensor, right: Tensor, scale: float) -> Tensor:
    """``to + scale left right``, in place where a call is a call.

    Traced, torch 2.11 takes an output changed through a view for one without a gradient: every gradient would be 0.
    """
    rows = to.view(-1, to.shape[-1])
    if torch.compiler.is_compiling():
        return torch.addmm(rows, left, right, alpha=scale).view(to.shape)
    rows.addmm_(left, right, alpha=scale)
    return to


def flattened(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


class _LoraLinear(torch.autograd.Function):
    """``x`` ``[..., in]`` in ``dtype``; ``adapters`` are a_1, b_1, a_2, b_2, ..., with one of ``scales`` a pair."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        scales: tuple[float, ...],
        *adapters: Tensor,
    ) -> Tensor:
        cast = [adapter.to(dtype) for adapter in adapters]
        out, products = _products(x, weight, bias, dtype, scales, cast)
        needs_x, needs = ctx.needs_input_grad[0], ctx.needs_input_grad[5:]
        kept = [product if needed else None for product, needed in zip(products, needs[1::2], strict=True)]
        # The weight is saved by reference and cast again in the backward pass; the adapters are small.
        ctx.save_for_backward(x if any(needs[::2]) else None, weight if needs_x else None, *cast, *kept)
        ctx.dtype, ctx.scales, ctx.adapter_dtypes = dtype, scales, [adapter.dtype for adapter in adapters]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dtype, needs = ctx.dtype, ctx.needs_input_grad[5:]
        x, weight, *rest = ctx.saved_tensors
        shape, grad = grad.shape, flattened(grad)
        grad_x = None if weight is None else grad @ weight.to(dtype)
        grads: list[Tensor | None] = []
        for pair, scale in enumerate(ctx.scales):
            a, b, product = rest[2 * pair], rest[2 * pair + 1], rest[2 * len(ctx.scales) + pair]
            needs_a, needs_b = needs[2 * pair], needs[2 * pair + 1]
            grad_a = None
            if needs_a or grad_x is not None:
                inner = grad @ b
                if grad_x is not None:
                    grad_x = with_product(grad_x, inner, a, scale)
                if needs_a:
                    grad_a = weight_gradient(inner, flattened(x), scale, ctx.adapter_dtypes[2 * pair])
            grads.append(grad_a)
            of_b = ctx.adapter_dtypes[2 * pair + 1]
            grads.append(weight_gradient(grad, product, scale, of_b) if needs_b else None)
        if grad_x is not None:
            grad_x = grad_x.view(*shape[:-1], grad_x.shape[-1])
        return grad_x, None, None, None, None, *grads


def weight_gradient(left: Tensor, right: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """``scale left^T right`` in ``dtype``, never rounded in between to less where the device can do so."""
    if left.is_cuda and left.dtype in (torch.bfloat16, torch.float16):
        product = torch.mm(left.t(), right, out_dtype=torch.float32)
    else:
        product = torch.mm(left.t(), right).to(torch.promote_types(left.dtype, dtype))
    return (product if scale == 1 else product.mul_(scale)).to(dtype)


def lora_linear(x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    """``x W^T + bias + scale (x A^T) B^T``, the low-rank product added in place by the matrix product that makes it.

    Three matrix products forward; backward two, or four where ``x`` needs a gradient. Gradients flow to ``x``,
    ``lora_a`` and ``lora_b``, each only if it requires one; with a ``weight`` or ``bias`` that requires one this is
    :func:`advflow_ext.reference.lora_linear`. Saved for backward: ``x``, ``x A^T``, the base weight by
    reference, and the adapters as they were multiplied.

    Everything is computed in the dtype of ``x``, or in autocast's where that is on, as PEFT does there. The adapters
    may have any dtype: they are cast, not the activations, so an fp32 adapter on a bf16 base is multiplied in bf16, as
    under autocast. Its gradient is fp32: on CUDA, whose matrix product has an fp32 output, accumulated and handed over
    without a rounding; elsewhere rounded once to the dtype of ``x``.

    Arguments: ``x`` ``[..., in]``; ``weight`` ``[out, in]``; ``bias`` ``[out]`` or None; ``lora_a`` ``[r, in]``;
    ``lora_b`` ``[out, r]``; ``scale`` a number. Returns ``[..., out]``.

    Raises ValueError where shapes or devices do not fit, where ``weight`` has another dtype than ``x`` and autocast is
    off, and for a ``scale`` that is not a finite number.
    """
    lora_linear_arguments(x, weight, bias, lora_a, lora_b, scale)
    return _lora_linear(x, weight, bias, [Adapter(lora_a, lora_b, scale)])


def _lora_linear(x: Tensor, weight: Tensor, bias: Tensor | None, adapters: Sequence[Adapter]) -> Tensor:
    dtype = compute_dtype(x)
    if weight.dtype != dtype and not autocasts(x):
        raise ValueError(f"x is {dtype} and weight {weight.dtype}; accepted without autocast is one dtype for both.")
    if torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad)):
        out = F.linear(x, weight, bias)
        for a, b, scale in adapters:
            out = (out + F.linear(F.linear(x.to(a.dtype), a), b) * scale).to(out.dtype)
        return out
    x = x.to(dtype)
    scales = tuple(adapter.scale for adapter in adapters)
    tensors = [tensor for adapter in adapters for tensor in (adapter.a, adapter.b)]
    # Dynamo cannot trace a Function of this signature where no gradient is asked for.
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *tensors)):
        out = _LoraLinear.apply(x, weight, bias, dtype, scales, *tensors)
    else:
        out, _ = _products(x, weight, bias, dtype, scales, [tensor.to(dtype) for tensor in tensors])
    return out


def compute_dtype(x: Tensor) -> torch.dtype:
    """In which a layer multiplies ``x``."""
    return torch.get_autocast_dtype(x.device.type) if autocasts(x) else x.dtype


def autocasts(x: Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64  # which autocast leaves alone


def is_lora_layer(module: nn.Module) -> bool:
    """Whether ``module`` is a PEFT layer with LoRA adapters on a layer of its own."""
    return all(isinstance(getattr(module, name, None), nn.ModuleDict) for name in ("lora_A", "lora_B")) and hasattr(
        module, "base_layer"
    )


def lora_obstacle(layer: PeftLayer) -> str | None:
    """Why :func:`lora_forward` leaves ``layer`` as it is now to its own forward, as a sentence; None where it does not.

    It is asked at every call, because training mode, merging and the active adapters may change in between.
    """
    if not is_lora_layer(layer) or not is_peft_linear(layer):
        return f"{type(layer).__name__} is not PEFT's LoRA Linear."
    for name in _active_names(layer):
        if obstacle := _adapter_obstacle(layer, name):
            return obstacle
        dropout = layer.lora_dropout[name]
        if not isinstance(dropout, nn.Identity) and dropout.training:
            return f"Adapter {name!r} has a dropout, and the layer is in training mode."
    return _base_obstacle(layer)


def _adapter_obstacle(layer: PeftLayer, name: str) -> str | None:
    """What there is to adapter ``name`` beside the two matrices and the scale, as a sentence."""
    if layer.use_dora.get(name, False):
        return f"Adapter {name!r} is DoRA."
    if name in getattr(layer, "lora_variant", {}):
        return f"Adapter {name!r} is the LoRA variant {type(layer.lora_variant[name]).__name__}."
    for matrix in (layer.lora_A[name], layer.lora_B[name]):
        if not _is_plain(matrix):
            return f"A matrix of adapter {name!r} has hooks or is a {type(matrix).__name__}, not a plain Linear."
        if matrix.bias is not None:
            return f"Adapter {name!r} has a bias."
    return None


def _base_obstacle(layer: PeftLayer) -> str | None:
    if getattr(layer, "merged_adapters", None):
        return "PEFT has merged its adapters into the base weight."
    if not _is_plain(layer.base_layer):
        return f"Its base layer has hooks or is a {type(layer.base_layer).__name__}, not a plain Linear."
    if getattr(layer, "fan_in_fan_out", False):
        return "Its base weight is transposed (fan_in_fan_out)."
    return None


def _is_plain(module: object) -> bool:
    """Whether calling ``module`` is `F.linear` of its weight and bias and nothing else."""
    return type(module) is nn.Linear and "forward" not in module.__dict__ and not has_hooks(module)


def has_hooks(module: nn.Module) -> bool:
    """Whether calling ``module`` is more than its forward."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _active_names(layer: PeftLayer) -> list[str]:
    return [name for name in layer.active_adapters if name in layer.lora_A]


def active_adapters(layer: PeftLayer) -> list[Adapter]:
    return [
        Adapter(layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name])
        for name in _active_names(layer)
    ]


def lora_forward(
    layer: PeftLayer, x: Tensor, *args: Any, stock: Callable[..., Tensor] | None = None, **kwargs: Any
) -> Tensor:
    """What ``layer``, PEFT's LoRA ``Linear``, gives for ``x`` ``[..., in]``, by :func:`lora_linear`.

    Any number of active adapters, each with its own rank, scale and dtype. Where :func:`lora_obstacle` has something to
    say, where the adapters are disabled, and with any further argument (such as ``adapter_names``), it is the stock
    forward's result. ``stock`` is that forward; None takes the one of the layer's class, which is right unless the
    class is what has been patched.
    """
    if args or kwargs or getattr(layer, "disable_adapters", True) or lora_obstacle(layer) is not None:
        return (stock or type(layer).forward)(layer, x, *args, **kwargs)
    base = layer.base_layer
    adapters = active_adapters(layer)
    if not adapters:
        out: Tensor = base(x)
        return out
    return _lora_linear(x, base.weight, base.bias, adapters)


def merge_obstacle(layer: PeftLayer, name: str) -> str | None:
    """Why :func:`merged_weight` does not exist for adapter ``name`` of ``layer``, as a sentence; None where it does."""
    if obstacle := _base_obstacle(layer):
        return obstacle
    weight = layer.base_layer.weight
    if not isinstance(weight, nn.Parameter) or is_traceable_wrapper_subclass(weight) or not weight.is_floating_point():
        return f"Its base weight is a {type(weight).__name__} of {weight.dtype}, not a plain floating-point parameter."
    return _adapter_obstacle(layer, name) if name in layer.lora_A else None


@torch.no_grad()
def merged_weight(layer: PeftLayer, name: str) -> Tensor:
    """``W + scale B A`` ``[out, in]`` of adapter ``name``, computed in float32 and rounded once to the dtype of W.

    What of ``scale B A`` is smaller than half a unit in the last place of W is lost in that rounding.

    Raises ValueError for a layer without that adapter, and for one whose merged weight is another.
    """
    if not is_lora_layer(layer) or name not in layer.lora_A:
        raise ValueError(f"layer is a {type(layer).__name__} without adapter {name!r}; accepted is one that has it.")
    if obstacle := merge_obstacle(layer, name):
        raise ValueError(f"layer has no merged weight. {obstacle}")
    weight = layer.base_layer.weight
    wide = torch.promote_types(weight.dtype, torch.float32)
    a, b = layer.lora_A[name].weight.to(wide), layer.lora_B[name].weight.to(wide)
    return torch.addmm(weight.to(wide), b, a, alpha=layer.scaling[name]).to(weight.dtype)


def merge_stamp(layer: PeftLayer, name: str) -> tuple[object, ...]:
    """Differs as soon as :func:`merged_weight` would; without the adapter, as soon as the base weight does."""
    modules = layer._modules  # past nn.Module.__getattr__, as this is asked at every switch of policies
    weights = [modules["base_layer"]._parameters["weight"]]
    for kind in ("lora_A", "lora_B"):
        if matrix := modules[kind]._modules.get(name):
            weights.append(matrix._parameters["weight"])
    return *map(stamp, weights), layer.scaling.get(name)
