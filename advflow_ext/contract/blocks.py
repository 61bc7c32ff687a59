"""Argument checks shared by every implementation of a transformer op, so that all of them refuse the same calls."""

from __future__ import annotations

import torch
from torch import Tensor

from advflow_ext.contract.checks import require_float_tensor
from advflow_ext.contract.numbers import require_number


def require_eps(eps: float, x: Tensor) -> None:
    require_number("eps", eps, low=0.0)
    require_held("eps", eps, x)


def require_held(name: str, value: float, x: Tensor) -> None:
    """Refuses what the arithmetic on ``x`` would read as infinity."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if abs(value) > torch.finfo(wide).max:
        raise ValueError(
            f"{name} is {value!r}; accepted is a number that {wide} holds, in which {x.dtype} is added up."
        )


def require_several(name: str, values: object, what: tuple[str, ...]) -> None:
    if isinstance(values, (tuple, list)) and len(values) == len(what):
        return
    given = f"{len(values)} values" if isinstance(values, (tuple, list)) else f"a {type(values).__name__}"
    raise ValueError(f"{name} is {given}; accepted is a tuple ({', '.join(what)}).")


def require_tokens(name: str, value: Tensor) -> None:
    require_float_tensor(name, value)
    if value.dim() != 3 or not value.shape[2]:
        raise ValueError(f"{name} has shape {list(value.shape)}; accepted is [batch, tokens, width].")


def require_shape(name: str, value: Tensor, shape: tuple[int, ...], meaning: str, like: Tensor) -> None:
    require_float_tensor(name, value)
    if value.shape != shape:
        raise ValueError(f"{name} has shape {list(value.shape)}; accepted is {meaning}, {list(shape)}.")
    if value.device != like.device:
        raise ValueError(f"{name} is on {value.device}; accepted is {like.device}, where the other tensors are.")


def require_dtype_of(name: str, like: Tensor, others: dict[str, Tensor]) -> None:
    for other, value in others.items():
        if value.dtype != like.dtype:
            raise ValueError(f"{other} has dtype {value.dtype}; accepted is that of {name}, {like.dtype}.")
