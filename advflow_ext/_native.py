"""Finds the compiled module, and says in one sentence what is missing when it cannot serve."""

from __future__ import annotations

import importlib
import json
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

BUILD_RECORD = Path(__file__).with_name("_build.json")  # written by setup.py beside the compiled module

# The numbers and columns that Python and C++ must agree on, checked when the module is loaded.
INTERFACE = 2
DTYPES = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 3}
# Columns of residual_stats, each a mean over one sample's elements.
STATS = ("vu_sq", "vo_sq", "vp_sq", "ou_sq", "vu_abs", "ou_abs", "plus_abs", "minus_abs")


def _release(version: str) -> str:
    # "2.13.0+cpu" and "2.13.0+cu130" share one C++ interface.
    return version.split("+")[0]


def _load() -> tuple[ModuleType | None, str]:
    """The module and "", or None and the sentence that explains why."""
    # Read before importing: a module built for another torch may crash the interpreter instead of raising.
    if BUILD_RECORD.exists():
        built_for = json.loads(BUILD_RECORD.read_text())["torch"]
        if _release(built_for) != _release(torch.__version__):
            return None, (
                f"advflow_ext was built for torch {built_for} but torch {torch.__version__} is installed; reinstall it "
                "with 'pip install --no-build-isolation .' (until then the slower PyTorch reference serves)."
            )
    try:
        module = importlib.import_module("advflow_ext._C")
    except ImportError as error:
        return None, (
            f"advflow_ext has no usable compiled module ({error}); build it with 'pip install --no-build-isolation .' "
            "(until then the slower PyTorch reference serves)."
        )
    found = tuple(getattr(module, name, None) for name in ("INTERFACE", "DTYPES", "STATS"))
    if found != (INTERFACE, DTYPES, STATS):
        return None, (
            "advflow_ext's compiled module belongs to another version of the package; reinstall it with "
            "'pip install --no-build-isolation .' (until then the slower PyTorch reference serves)."
        )
    return module, ""


module, problem = _load()
if problem:
    warnings.warn(problem, RuntimeWarning, stacklevel=3)


def build_info() -> dict[str, Any] | None:
    """The build record compiled into the module, or None where there is none."""
    return None if module is None else json.loads(module.build_info())


DEVICES: frozenset[str] = frozenset()
if module is not None:
    DEVICES = frozenset({"cpu", "cuda"} if module.WITH_CUDA else {"cpu"})

_devices_warned_of: set[str] = set()


def transformed(*tensors: object) -> bool:
    """Whether forward-mode differentiation or a torch.func transform is on, which the compiled ops take no part in."""
    if torch.compiler.is_compiling():
        return False
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    return forward_ad._current_level >= 0 or any(isinstance(tensor, Tensor) and wrapped(tensor) for tensor in tensors)


def serves(tensor: object, *others: object) -> bool:
    """Whether the compiled ops serve a call on these tensors; says once for each device when they have no kernels."""
    if module is None or transformed(tensor, *others):
        return False
    device = tensor.device.type if isinstance(tensor, Tensor) else "cpu"
    if device in DEVICES or device == "meta":
        return True
    if device not in _devices_warned_of and not torch.compiler.is_compiling():
        _devices_warned_of.add(device)
        warnings.warn(
            f"advflow_ext was built without {device} kernels: the slower PyTorch reference serves {device} tensors.",
            RuntimeWarning,
            stacklevel=3,
        )
    return False
