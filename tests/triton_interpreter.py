"""Triton's interpreter, made to round as a GPU does."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
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

    with (
        mock.patch.object(interpreter, "_convert_float", convert),
        mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1"}),
    ):
        yield


def to_nearest_bfloat16(data: np.ndarray) -> np.ndarray:
    """The bits of float32 `data` rounded to bfloat16 as GPUs do; the interpreter itself cuts them off."""
    bits = np.ascontiguousarray(data).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(data), np.uint16(0x7FC0), rounded)
