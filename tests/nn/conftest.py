"""The Triton kernels run in Triton's interpreter here, and on the GPU where there is one."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # kernel_checks.py


@pytest.fixture(scope="module", autouse=True)
def kernels_serve_here() -> Iterator[None]:
    """On a GPU they do so by themselves; on the CPU they are asked to by the variable that Triton reads too."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        yield
        return
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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where there is a GPU the kernels run on it, so that "-m gpu" has to find these tests."""
    here = str(Path(__file__).parent)
    for item in items:
        if torch.cuda.is_available() and str(item.path).startswith(here):
            item.add_marker(pytest.mark.gpu)


def to_nearest_bfloat16(data: np.ndarray) -> np.ndarray:
    """The bits of float32 `data` rounded to bfloat16 as GPUs do; the interpreter itself cuts them off."""
    bits = np.ascontiguousarray(data).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(data), np.uint16(0x7FC0), rounded)
