"""Linear layers that read one input, as the projections of a token stream do: LoRA layers and plain ones, together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from advflow_ext.nn.lora import (
    active_adapters,
    autocasts,
    compute_dtype,
    has_hooks,
    is_lora_layer,
    lora_obstacle,
)
from advflow_ext.nn.low_rank import Adapter, Base, low_rank_linears


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
    if not adapters and not (torch.is_grad_enabled() and x.requires_grad):
        return [layer(x) for layer in layers]
    return low_rank_linears(x, [Base(base.weight, base.bias) for base in bases], adapters, compute_dtype(x))


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
