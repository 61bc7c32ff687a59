"""Triton's interpreter, made to round as a GPU does, and in a fraction of its time."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np


@contextmanager
def serving() -> Iterator[None]:
    """Within it our Triton kernels serve on the CPU: asked to by the variable that Triton reads too."""
    from triton import language
    from triton.runtime import interpreter

    stock = interpreter._convert_float

    def convert(data: np.ndarray, source: Any, target: Any, rounding_mode: Any) -> np.ndarray:
        if (source.name, target.name) == ("fp32", "bf16"):
            return to_nearest_bfloat16(data)
        return stock(data, source, target, rounding_mode)

    stock_patch = interpreter._patch_lang
    patched: list[Any] = []

    # Stock replaces all of triton.language anew whenever one function of a kernel calls another, which is most of what
    # it does. Once for each function is as good: replaced twice, it is the same.
    @functools.cache
    def patch_once(function: Callable[..., Any]) -> Any:
        patched.append(stock_patch(function))
        return SimpleNamespace(restore=lambda: None)

    stock_dtype = interpreter._get_np_dtype
    dtypes: dict[str, np.dtype[Any]] = {}

    def dtype(of: Any) -> np.dtype[Any]:
        """Stock writes a table of all types before it looks one up."""
        if of.name not in dtypes:
            dtypes[of.name] = stock_dtype(of)
        return dtypes[of.name]

    with (
        mock.patch.object(interpreter, "_convert_float", convert),
        mock.patch.object(interpreter, "_get_np_dtype", dtype),
        mock.patch.object(interpreter, "_patch_lang", patch_once),
        mock.patch.object(language.block_type, "__init__", _made_once(language.block_type, _block_key, "element_ty")),
        mock.patch.object(language.tensor, "__init__", _made_once(language.tensor, _tensor_key, "handle", "type")),
        mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1"}),
    ):
        try:
            yield
        finally:
            for scope in reversed(patched):
                scope.restore()


def _made_once(cls: Any, key_of: Callable[..., Hashable], *given: str) -> Callable[..., None]:
    """An `__init__` for `cls` that works out once for each key of its two arguments all but the attributes `given`."""
    stock = cls.__init__
    known: dict[Hashable, dict[str, Any]] = {}

    def init(self: Any, first: Any, second: Any) -> None:
        key = key_of(first, second)
        if key not in known:
            stock(self, first, second)
            known[key] = {name: value for name, value in vars(self).items() if name not in given}
        vars(self).update(known[key], **dict(zip(given, (first, second), strict=False)))

    return init


def _block_key(element: Any, shape: Any) -> Hashable:
    return element.name, *(getattr(size, "value", size) for size in shape)


def _tensor_key(handle: Any, of: Any) -> Hashable:
    return of.name


def to_nearest_bfloat16(data: np.ndarray) -> np.ndarray:
    """The bits of float32 `data` rounded to bfloat16 as GPUs do; the interpreter itself cuts them off."""
    bits = np.ascontiguousarray(data).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(data), np.uint16(0x7FC0), rounded)
