"""Launching a kernel again without Triton's look at each of its arguments.

Triton finds the compiled variant of a call by asking of every argument what it may depend on: its dtype, whether an
integer is 1 or a multiple of 16, whether a pointer is. With 40 arguments that takes the host longer than most of these
kernels take the device. Dtypes and the exact integers decide the same, and one look at a dictionary finds them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

_MOST_VARIANTS = 4096  # of a kernel: far more than a run has shapes; a bound all the same
_ALIGNMENT = 16  # bytes, of pointers, as Triton tells them apart


class Launcher:
    """``kernel``, whose parameters are first tensors, then numbers, then constants."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._compiled: dict[tuple[object, ...], Any] = {}

    def __call__(
        self,
        grid: tuple[int, int, int],
        tensors: Sequence[Tensor],
        numbers: tuple[float, ...],
        constants: tuple[int, ...],
        num_warps: int,
    ) -> None:
        """Launches on the current device, that of ``tensors``, and its current stream."""
        aligned = not any(tensor.data_ptr() % _ALIGNMENT for tensor in tensors)
        key = (tensors[0].device, numbers, constants, num_warps, *[tensor.dtype for tensor in tensors])
        compiled = self._compiled.get(key) if aligned else None
        if compiled is not None:
            compiled[grid](*tensors, *numbers, *constants)
            return
        compiled = self._kernel[grid](*tensors, *numbers, *constants, num_warps=num_warps)
        if aligned and compiled is not None:  # the interpreter compiles nothing
            if len(self._compiled) >= _MOST_VARIANTS:
                self._compiled.clear()
            self._compiled[key] = compiled
