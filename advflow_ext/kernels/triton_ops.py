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
from torch._library.triton import triton_ops_to_kernels
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.autograd import forward_ad

library = torch.library.Library("advflow", "FRAGMENT")

_TRACED = (FakeTensor, FunctionalTensor)
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
        device = _device(arguments)
        if device.index == torch.cuda.current_device():  # a context costs as much as a launch
            return kernel(*arguments)
        with torch.cuda.device(device):
            return kernel(*arguments)

    return run


def define(schema: str, module: str, function: str, shapes: Callable[..., list[Tensor]]) -> None:
    """Registers a raw op without gradient.

    ``advflow_ext.kernels.<module>.<function>`` launches ``<function>_kernel`` there; it is imported when it is first
    needed: nothing needs Triton before. ``shapes`` are those of the results, for tracing.

    Eager code calls the launcher. torch.compile sees the launch itself, as with PyTorch's ``triton_op``, whose own way
    through eager code takes the host longer.
    """
    library.define(schema)
    name = f"advflow::{schema.partition('(')[0]}"

    def kernels() -> Any:
        return importlib.import_module(f"advflow_ext.kernels.{module}")

    def launch(*arguments: Any) -> list[Tensor]:
        found: list[Tensor] = getattr(kernels(), function)(*arguments)
        return found

    def traced(*arguments: Any) -> list[Tensor]:
        if _device(arguments).type == "cuda":  # what compiled code is cached by holds the kernel's source from here on
            triton_ops_to_kernels[name] = [getattr(kernels(), f"{function}_kernel")]
        return shapes(*arguments)

    def captured(mode: Any, op: Any, types: Any, arguments: Any, keywords: Any) -> Any:
        if _device(arguments).type != "cuda" or torch.compiler.is_exporting():  # a program is exported without kernels
            return mode.__torch_dispatch__(op, types, arguments, keywords)
        if not all(issubclass(kind, _TRACED) or kind is Tensor for kind in types):
            return NotImplemented
        with mode:
            return launch(*arguments, **keywords)

    library.impl(name, launch, "CPU")
    library.impl(name, on_device_of_tensors(launch), "CUDA")
    torch.library.register_fake(name, traced, lib=library)
    torch.library.register_torch_dispatch(name, FunctionalTensorMode, captured, lib=library)


def _device(arguments: Any) -> torch.device:
    first = arguments[0]
    return (first if isinstance(first, Tensor) else first[0]).device
