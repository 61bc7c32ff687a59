"""Low-rank adapters on frozen linear layers: a training form made of matrix products alone, and merged weights.

PEFT's layers are recognised by what they hold (``lora_A``, ``lora_B``, ``scaling``, ``base_layer``, ...); PEFT itself
is never imported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from advflow_ext.nn._identity import is_peft_linear
from advflow_ext.nn._stamp import stamp
from advflow_ext.nn.low_rank import Adapter, Base, low_rank_linears
from advflow_ext.reference.lora_linear import lora_linear_arguments

PeftLayer = Any  # an nn.Module that `is_lora_layer`; what such a module holds is known by its names alone


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
    return low_rank_linears(x, [Base(weight, bias)], [(0, adapter) for adapter in adapters], dtype)[0]


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
