"""Batches in the shapes in which trainers hold them, for ops that know latents ``[N, ...]`` and numbers ``[N]``."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

from torch import Tensor

from advflow_ext.contract.outputs import LossOutput, SdeStep

P = ParamSpec("P")
R = TypeVar("R")

_LATENTS = frozenset(
    ("v", "x0", "noise", "v_old", "v_ref", "v_ema", "v_teacher", "eps", "x", "x_next", "means", "mean1", "mean2")
)


def any_batch(op: Callable[P, R]) -> Callable[P, R]:
    """``op``, whose first argument is a latent, for numbers a sample of other shapes than ``[N]``.

    * ``[N, 1]``, ``[N, 1, 1, 1]``: as trainers keep them to multiply latents by. A t may have no dimension at all.
    * ``[B, S]`` beside latents ``[B, S, ...]``, S steps or draws of an image: the op sees B*S samples, and what it
      returns of a sample comes back in that shape. Numbers ``[B]`` or ``[B, 1]`` then stand for all S of an image.

    Any other shape is left to the op, which refuses it.
    """
    names = tuple(inspect.signature(op).parameters)

    @functools.wraps(op)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        # Pairs, handed on as they came: of a name given twice or an argument too many Python itself says so.
        named = list(zip(names, args, strict=False))
        given = [*named, *kwargs.items()]
        if all(_is_plain(name, value) for name, value in given if isinstance(value, (Tensor, tuple))):
            return op(*args, **kwargs)
        first = args[0] if args else kwargs.get(names[0])
        batch = _batch_of(first, given) if isinstance(first, Tensor) else None
        if batch is None:
            return op(*args, **kwargs)
        flat: list[Any] = [_flattened(name, value, batch) for name, value in named]
        flat_kwargs: dict[str, Any] = {name: _flattened(name, value, batch) for name, value in kwargs.items()}
        result: R = op(*flat, *args[len(names) :], **flat_kwargs)  # type: ignore[arg-type]
        return _unflattened(result, batch) if len(batch) > 1 else result

    return call


def _is_plain(name: str, value: object) -> bool:
    if name in _LATENTS:
        return True
    if isinstance(value, Tensor):
        return value.dim() == 1 or (value.dim() == 0 and name != "t")
    return not isinstance(value, tuple) or all(_is_plain(name, part) for part in value)


def _batch_of(first: Tensor, given: Sequence[tuple[str, Any]]) -> tuple[int, ...] | None:
    """The dimensions of ``first`` that count samples: as many as a number has that is shaped as they are."""
    if first.dim() < 2:
        return None
    numbers = [part for name, value in given if name not in _LATENTS for part in _tensors(value)]
    alike = [n.dim() for n in numbers if 0 < n.dim() < first.dim() and n.shape == first.shape[: n.dim()]]
    batch = tuple(first.shape[: max(alike, default=1)])
    return batch if all(_leading(number, batch) is not None for number in numbers) else None


def _tensors(value: object) -> list[Tensor]:
    if isinstance(value, tuple):
        return [tensor for part in value for tensor in _tensors(part)]
    return [value] if isinstance(value, Tensor) else []


def _leading(number: Tensor, batch: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape of a number without the ones behind it, where ``batch`` begins with it."""
    shape = tuple(number.shape)
    while len(shape) > 1 and shape[-1] == 1:
        shape = shape[:-1]
    return shape if shape == batch[: len(shape)] else None


def _flattened(name: str, value: Any, batch: tuple[int, ...]) -> Any:
    if isinstance(value, tuple):
        return tuple(_flattened(name, part, batch) for part in value)
    if not isinstance(value, Tensor):
        return value
    if name in _LATENTS:
        matches = value.dim() > len(batch) and tuple(value.shape[: len(batch)]) == batch
        return value.flatten(0, len(batch) - 1) if matches else value
    shape = _leading(value, batch)
    assert shape is not None
    if not shape and name != "t":
        return value
    return value.reshape(shape + (1,) * (len(batch) - len(shape))).expand(batch).flatten()


def _unflattened(result: Any, batch: tuple[int, ...]) -> Any:
    if isinstance(result, LossOutput):
        return result._replace(loss=_unflattened(result.loss, batch))
    if isinstance(result, SdeStep):
        return SdeStep(*(part.unflatten(0, batch) for part in result))
    if isinstance(result, tuple):
        return tuple(part.unflatten(0, batch) for part in result)
    return result.unflatten(0, batch) if result.dim() else result
