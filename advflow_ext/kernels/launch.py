"""Launching a kernel again without Triton's look at each of its arguments.

Triton finds the compiled variant of a call by asking of every argument what it may depend on: its dtype, whether an
integer is 1 or a multiple of 16, whether a pointer is. With 40 arguments that takes the host longer than most of these
kernels take the device. Dtypes and the exact integers decide the same, and one look at a dictionary finds them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensor

_MOST_VARIANTS = 4096  # of a kernel: far more than a run has shapes; a bound all the same
_ALIGNMENT = 16  # bytes, of pointers, as Triton tells them apart


class Launcher:
    """``kernel``, whose parameters are first tensors, then numbers, then constants.

    None stands for a tensor that a variant does not touch, and never for the first.
    """

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._compiled: dict[tuple[object, ...], Any] = {}

    def __call__(
        self,
        grid: tuple[int, int, int],
        tensors: Sequence[Tensor | None],
        numbers: tuple[float, ...],
        constants: tuple[float, ...],
        num_warps: int,
    ) -> None:
        """Launches on the current device, that of ``tensors``, and its current stream.

        Where torch.compile traces, the launch becomes a node of the graph: Inductor generates it.
        """
        first = tensors[0]
        assert first is not None
        if isinstance(first, FunctionalTensor):
            torch.library.wrap_triton(self._kernel)[grid](*tensors, *numbers, *constants, num_warps=num_warps)
            return
        aligned = not any(tensor is not None and tensor.data_ptr() % _ALIGNMENT for tensor in tensors)
        dtypes = [None if tensor is None else tensor.dtype for tensor in tensors]
        key = (first.device, numbers, constants, num_warps, *dtypes)
        compiled = self._compiled.get(key) if aligned else None
        if compiled is not None:
            compiled[grid](*tensors, *numbers, *constants)
            return
        compiled = self._kernel[grid](*tensors, *numbers, *constants, num_warps=num_warps)
        if aligned and compiled is not None:  # the interpreter compiles nothing
            if len(self._compiled) >= _MOST_VARIANTS:
                self._compiled.clear()
            self._compiled[key] = compiled


def padded(count: int, tensors: Sequence[Tensor]) -> list[Tensor | None]:
    return [*tensors, *(None,) * (count - len(tensors))]


def strides(count: int, *tensors: Tensor | None) -> list[Any]:
    """The first ``count`` of each."""
    found: list[Any] = []
    for tensor in tensors:
        found += (0,) * count if tensor is None else tensor.stride()[:count]
    return found
