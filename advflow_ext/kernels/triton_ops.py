"""Where the Triton kernels can serve, and the library their raw ops are registered in."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

library = torch.library.Library("advflow", "FRAGMENT")

_HAS_TRITON = importlib.util.find_spec("triton") is not None


def serves(x: Tensor) -> bool:
    """Whether the Triton kernels run on tensors like ``x``: on CUDA, and on the CPU in Triton's interpreter.

    The interpreter is for tests: it is switched on by TRITON_INTERPRET=1 before a kernel is first used, and slow.
    float64 has no kernels: the references are exact there. Nor do they serve where a derivative is asked for that they
    have no rule for.
    """
    if x.dtype == torch.float64 or not _HAS_TRITON or _transformed(x):
        return False
    return x.device.type == "cuda" or (x.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1")


def _transformed(x: Tensor) -> bool:
    """Whether forward-mode differentiation or a torch.func transform is on, which raw ops would not take part in."""
    if torch.compiler.is_compiling():
        return False
    return forward_ad._current_level >= 0 or torch._C._functorch.is_functorch_wrapped_tensor(x)


def differentiated(tensors: Iterable[Tensor]) -> bool:
    """Whether an op on ``tensors`` needs its autograd function.

    Where it does not, calling the raw op saves time, and Dynamo cannot trace a function with a variable number of
    arguments of which none asks for a gradient.
    """
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def unit_stride(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The kernels take any strides but that of the last dimension."""
    return [tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in tensors]


def on_device_of_tensors(kernel: Callable[..., list[Tensor]]) -> Callable[..., list[Tensor]]:
    """``kernel``, whose first argument is a tensor or a list of some, with that device as the current one.

    Triton launches on the current device, and the dispatcher sets none for kernels written in Python.
    """

    @functools.wraps(kernel)
    def run(*arguments: Any) -> list[Tensor]:
        first = arguments[0]
        device = (first if isinstance(first, Tensor) else first[0]).device
        if device.index == torch.cuda.current_device():  # a context costs as much as a launch
            return kernel(*arguments)
        with torch.cuda.device(device):
            return kernel(*arguments)

    return run


def launcher(module: str, name: str) -> Callable[..., list[Tensor]]:
    """``advflow_ext.kernels.<module>.<name>``, imported when it is first called: nothing needs Triton before."""

    def launch(*arguments: Any) -> list[Tensor]:
        found: list[Tensor] = getattr(importlib.import_module(f"advflow_ext.kernels.{module}"), name)(*arguments)
        return found

    return launch


def define(schema: str, kernel: Callable[..., list[Tensor]], shapes: Callable[..., list[Tensor]]) -> None:
    """Registers a raw op without gradient: its ``kernel``, and the ``shapes`` of its results for tracing."""
    library.define(schema)
    name = schema.partition("(")[0]
    library.impl(name, kernel, "CPU")
    library.impl(name, on_device_of_tensors(kernel), "CUDA")
    torch.library.register_fake(f"advflow::{name}", shapes, lib=library)
