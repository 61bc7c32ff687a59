"""Merged weights: made once for every change of an adapter, kept within some bytes, put in the place of the bases'."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from advflow_ext.nn.lora import PeftLayer, merge_stamp, merged_weight

# What would take merged weights for the base's, and PEFT's own switching: while weights are merged, each of them first
# puts the bases back. The walk is that of parameters(), of PEFT's calls on a whole model, and of many others.
_OF_LAYERS = ("named_modules", "set_adapter", "enable_adapters", "delete_adapter", "update_layer", "merge", "unmerge")
_OF_ALL = ("named_parameters", "apply", "_apply", "__deepcopy__", "__reduce_ex__")
MERGED_BY = "_advflow_merged_by"  # in a layer with merged weights: what puts the bases back


class _Merged(NamedTuple):
    weights: list[nn.Parameter]
    stamps: list[object]
    size: int


class MergedWeights:
    """Those of some adapters, at most ``most_bytes`` together, the least recently used dropped first."""

    def __init__(self, most_bytes: float) -> None:
        self._most_bytes = most_bytes
        self._held: OrderedDict[str, _Merged] = OrderedDict()

    def of(self, layers: Sequence[PeftLayer], adapter: str) -> list[nn.Parameter]:
        """A weight for each of ``layers``, which is its base's where it is without the adapter."""
        held = self._held.pop(adapter, None)
        stamps: list[object] = [merge_stamp(layer, adapter) for layer in layers]
        if held is None or held.stamps != stamps:
            size = merged_size(layers, adapter)
            while self._held and sum(other.size for other in self._held.values()) + size > self._most_bytes:
                self._held.popitem(last=False)
            held = _Merged(_merge(layers, adapter, held), stamps, size)
        self._held[adapter] = held  # as the last, the most recently used
        return held.weights

    def drop(self, adapter: str) -> None:
        self._held.pop(adapter, None)

    def clear(self) -> None:
        self._held.clear()


# Tensors made under inference mode could not be written again outside it.
@torch.inference_mode(False)
@torch.no_grad()
def _merge(layers: Sequence[PeftLayer], adapter: str, held: _Merged | None) -> list[nn.Parameter]:
    """Merges into the memory of ``held``, so that what has recorded its addresses goes on with the new weights."""
    weights = []
    for i, layer in enumerate(layers):
        base = layer.base_layer.weight
        old = None if held is None else held.weights[i]
        if adapter not in layer.lora_A:
            weights.append(base)
        elif old is not None and old is not base and (old.dtype, old.device) == (base.dtype, base.device):
            weights.append(old.copy_(merged_weight(layer, adapter)))
        else:
            weights.append(nn.Parameter(merged_weight(layer, adapter), requires_grad=False))
    return weights


def merged_size(layers: Sequence[PeftLayer], adapter: str) -> int:
    """Bytes of the adapter's merged weights."""
    return sum(layer.base_layer.weight.nbytes for layer in layers if adapter in layer.lora_A)


class Bases:
    """The base weights of some layers, which others may stand in for."""

    def __init__(self, layers: Sequence[PeftLayer]) -> None:
        self._layers = layers
        self._weights: list[nn.Parameter] | None = None  # what others stand in for at the moment
        self._first: list[tuple[dict[str, Any], dict[str, Any]]] = []  # of each layer and its base, once needed

    @property
    def replaced(self) -> bool:
        return self._weights is not None

    def replace(self, weights: Sequence[nn.Parameter], give_way: Callable[[], None]) -> None:
        """Puts ``weights`` in their place. Who must not find them there calls ``give_way``, always the same, first."""
        if not self._first:
            self._first = [
                (
                    {name: _BasesFirst(give_way, layer, name) for name in (*_OF_LAYERS, *_OF_ALL)}
                    | {MERGED_BY: give_way},
                    {name: _BasesFirst(give_way, layer.base_layer, name) for name in _OF_ALL},
                )
                for layer in self._layers
            ]
        self._weights = [layer.base_layer.weight for layer in self._layers]
        for layer, weight, (of_layer, of_base) in zip(self._layers, weights, self._first, strict=True):
            base = layer.base_layer
            base._parameters["weight"] = weight
            layer.__dict__.update(of_layer)
            base.__dict__.update(of_base)

    def put_back(self) -> None:
        if self._weights is None:
            return
        for layer, weight, ours in zip(self._layers, self._weights, self._first, strict=True):
            layer.base_layer._parameters["weight"] = weight
            for module, names in zip((layer, layer.base_layer), ours, strict=True):
                for name in names:
                    del module.__dict__[name]
        self._weights = None


class _BasesFirst:
    """Stands for a method of `module` while merged weights are in force there."""

    def __init__(self, give_way: Callable[[], None], module: nn.Module, name: str) -> None:
        self._give_way, self._module, self._name = give_way, module, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._give_way()
        if self._name == "__deepcopy__":  # which modules have not, but Python asks for
            return copy.deepcopy(self._module, *args)
        return getattr(self._module, self._name)(*args, **kwargs)


@cache
def count_optimizer_steps() -> None:
    """Counts, from now on, every step of an optimiser as a version of its parameters: fused ones do not themselves."""

    def count(optimizer: torch.optim.Optimizer, *_: object) -> None:
        for group in optimizer.param_groups:
            torch.autograd.graph.increment_version([p for p in group["params"] if p.grad is not None])

    register_optimizer_step_post_hook(count)
