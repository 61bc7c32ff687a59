"""Triton's interpreter, made to round as a GPU does, and in a third of its time."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np


@contextmanager
def serving() -> Iterator[None]:
    """Within it our Triton kernels serve on the CPU: asked to by the variable that Triton reads too."""
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

    with (
        mock.patch.object(interpreter, "_convert_float", convert),
        mock.patch.object(interpreter, "_patch_lang", patch_once),
        mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1"}),
    ):
        try:
            yield
        finally:
            for scope in reversed(patched):
                scope.restore()


def to_nearest_bfloat16(data: np.ndarray) -> np.ndarray:
    """The bits of float32 `data` rounded to bfloat16 as GPUs do; the interpreter itself cuts them off."""
    bits = np.ascontiguousarray(data).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(data), np.uint16(0x7FC0), rounded)
