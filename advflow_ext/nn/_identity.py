"""Whether a module is of a known class: told by the class itself, never by its name."""

from __future__ import annotations

import sys

import torch

MARK = "_advflow_patch"  # on classes that apply_to_sd3, or a sibling, has patched, or derived
STOCK = "_advflow_stock_class"  # on the latter: what they were derived from


def is_exactly(module: object, *classes: type) -> bool:
    """Whether ``module`` is of one of ``classes``, and nobody has written another class in between.

    Those that FSDP2, ``replicate`` and our patches derive bring no computation of their own.
    """
    cls = type(module)
    if any(cls is known for known in classes):
        return True
    if torch.compiler.is_compiling():  # Dynamo need not trace the rest
        stock = getattr(cls, STOCK, None)
        return any(stock is known for known in classes)
    mro = cls.__mro__
    return any(known in mro and all(map(_adds_nothing, mro[: mro.index(known)])) for known in classes)


def _adds_nothing(cls: type) -> bool:
    return MARK in vars(cls) or (cls.__module__.startswith("torch.distributed.") and "forward" not in vars(cls))


def is_as_written(cls: type, name: str = "") -> bool:
    """Whether the method ``name`` of ``cls`` is the one its own file defines.

    Unless told otherwise that is its forward, or its ``__call__``, for what is no module.
    """
    if MARK in vars(cls):  # exchanged by apply_to_sd3, which asked before
        return True
    name = name or ("forward" if hasattr(cls, "forward") else "__call__")
    function = vars(cls).get(name)
    code, names = getattr(function, "__code__", None), getattr(function, "__globals__", None)
    return (
        code is not None
        and code.co_qualname == f"{cls.__qualname__}.{name}"
        and names is vars(sys.modules[cls.__module__])
    )


def is_peft_linear(module: object) -> bool:
    """Whether ``module`` is PEFT's LoRA ``Linear``. Where PEFT has not been imported nothing can be one."""
    linear = peft_linear()
    return linear is not None and is_exactly(module, linear)


def peft_linear() -> type | None:
    return getattr(sys.modules.get("peft.tuners.lora.layer"), "Linear", None)
