"""The modulation of frozen AdaLN layers, computed once for all policies that look at the same batch.

It depends on timestep and pooled text alone. Those linears are a third of SD3.5 Medium's parameters and no LoRA target,
so that learner, rollout policy and reference compute the same numbers from the same tensors.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advflow_ext.nn._stamp import stamp
from advflow_ext.nn.lora import is_lora_layer

_active: ModulationCache | None = None


class ModulationCache:
    """While it is on, what a model makes of a (timestep, pooled text) is computed once::

        cache = ModulationCache(transformer)
        with cache:
            v_old = transformer(x, tokens, pooled, timestep)  # with the weights of one policy
            v = transformer(x, tokens, pooled, timestep)  # with those of another, the same timestep and pooled

    It serves the model's ``time_text_embed``, the ``silu`` and ``linear`` of every AdaLN layer in it, and whoever calls
    :func:`modulation`. A result is found again by the identity and version of the tensors that went in and of the
    weights, so tensors that are merely equal are computed anew. Nothing is kept where a gradient is needed, where
    adapters sit on such a layer, and inside what torch.compile compiles. While it is off, every module is the stock
    one, and nothing is held.

    Going through the model takes a while, switching does not: keep the object and enter it for every batch.

    Arguments:
        model: one with ``time_text_embed``, such as diffusers' ``SD3Transformer2DModel``.
        size: results kept for each module, the least recently used dropped first.

    Raises ValueError for a model without ``time_text_embed`` and a ``size`` that is no positive integer, RuntimeError
    when another cache is on and when the model is copied or saved meanwhile.
    """

    def __init__(self, model: nn.Module, size: int = 2) -> None:
        if not isinstance(getattr(model, "time_text_embed", None), nn.Module):
            raise ValueError(f"model is a {type(model).__name__}; accepted is one with a module time_text_embed.")
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"size is {size!r}; accepted is a positive integer.")
        self._modules = dict.fromkeys(_cacheable(model))
        self._size = size
        self._results: dict[nn.Module, OrderedDict[tuple[object, ...], tuple[tuple[Tensor, ...], Tensor]]] = {}

    def __enter__(self) -> ModulationCache:
        global _active
        if _active is not None:
            raise RuntimeError("a ModulationCache is on already; accepted is one at a time.")
        _active = self
        for module in self._modules:
            module.__dict__.setdefault("forward", _Remembered(self, module))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        global _active
        _active = None
        for module in self._modules:
            if isinstance(module.__dict__["forward"], _Remembered):
                del module.__dict__["forward"]
        self._results.clear()

    def serves(self, module: nn.Module) -> bool:
        return module in self._modules

    def get(self, module: nn.Module, inputs: tuple[Tensor, ...], compute: Callable[[], Tensor]) -> Tensor:
        """``compute()``, or what it gave the last time ``module`` met these ``inputs``."""
        # A leaf's own dictionary, because parameters() of all AdaLN layers would take longer than what is saved.
        weights = [w for w in module._parameters.values() if w is not None] or list(module.parameters())
        if torch.compiler.is_compiling() or any(t.requires_grad for t in (*inputs, *weights)):
            return compute()
        device = inputs[0].device.type
        mode = (torch.is_inference_mode_enabled(), torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        key = (*mode, *map(stamp, inputs), *map(stamp, weights))
        results = self._results.setdefault(module, OrderedDict())
        if key not in results:
            # The inputs are kept too: as long as they live, nothing else can have their identity.
            results[key] = (inputs, compute())
            if len(results) > self._size:
                results.popitem(last=False)
        results.move_to_end(key)
        return results[key][1]


def modulation(linear: nn.Module, emb: Tensor) -> Tensor:
    """``linear(silu(emb))`` of an AdaLN layer: from the cache that is on, where one is, and computed otherwise."""
    cache = None if torch.compiler.is_compiling() else _active
    if cache is None or not cache.serves(linear):
        out: Tensor = linear(F.silu(emb))
        return out
    return cache.get(linear, (emb,), lambda: type(linear).forward(linear, F.silu(emb)))


def is_on() -> bool:
    return _active is not None


class _Remembered:
    """Stands for the forward of ``module``, whose inputs are all tensors."""

    def __init__(self, cache: ModulationCache, module: nn.Module) -> None:
        self._cache, self._module, self._stock = cache, module, type(module).forward

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise RuntimeError(
            "a model is copied or saved while its ModulationCache is on; accepted is after its with block."
        )

    def __call__(self, *inputs: Tensor, **kwargs: Any) -> Tensor:
        if kwargs:
            out: Tensor = self._stock(self._module, *inputs, **kwargs)
            return out
        return self._cache.get(self._module, inputs, lambda: self._stock(self._module, *inputs))


def _cacheable(model: nn.Module) -> Iterator[nn.Module]:
    """The modules whose forward may be replaced: no adapter is inside, and they are not compiled."""
    compiled = {
        inner for module in model.modules() if module._compiled_call_impl is not None for inner in module.modules()
    }
    embedding = model.time_text_embed
    assert isinstance(embedding, nn.Module)
    if not any(is_lora_layer(module) for module in embedding.modules()) and embedding not in compiled:
        yield embedding
    for module in model.modules():
        silu, linear = getattr(module, "silu", None), getattr(module, "linear", None)
        if type(silu) is nn.SiLU and type(linear) is nn.Linear and not {silu, linear} & compiled:
            yield silu
            yield linear
