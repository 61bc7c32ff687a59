"""A whole loss as one operator: its shapes for tracing, and typed entries.

Two launches forward, which hold the statistics, the loss's formula and its summary; one backward. The gradient, to v
alone, is attached in C++.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from advflow_ext import _native
from advflow_ext.contract.checks import REDUCTIONS
from advflow_ext.contract.numbers import Number
from advflow_ext.kernels.raw_checks import check_accumulate, check_device, check_float, check_latents, check_like

Samples = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]  # v, x0, noise, v_old, v_ref
Transitions = tuple[Tensor, Tensor, Tensor, Tensor | None]  # v, eps, v_old, v_ref

# As csrc/torch/bindings.cpp says them.
_STEP_COLUMNS = 0 if _native.module is None else _native.module.STEP_COLUMNS
# Of transitions, how many numbers, how many values each choice has, how many metrics.
_LOSSES: dict[str, tuple[bool, int, Sequence[int], int]] = {} if _native.module is None else _native.module.LOSSES


def _register_fakes() -> None:
    @torch.library.register_fake("advflow::forward_loss")  # type: ignore[untyped-decorator]
    def forward_loss_shapes(
        name: str,
        v: Tensor,
        x0: Tensor,
        noise: Tensor,
        v_old: Tensor | None,
        v_ref: Tensor | None,
        t: Tensor,
        advantages: Tensor,
        numbers: Sequence[float],
        tensors: Sequence[Tensor | None],
        choices: Sequence[int],
        reduction: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        _check_name(name, transitions=False)
        latents = {"v": v, "x0": x0, "noise": noise}, {"v_old": v_old, "v_ref": v_ref}
        accumulate = check_latents("forward_loss", *latents)
        _check_scores("t", t, v)
        return _outputs(name, v, accumulate, advantages, numbers, tensors, choices, reduction)

    @torch.library.register_fake("advflow::reverse_loss")  # type: ignore[untyped-decorator]
    def reverse_loss_shapes(
        name: str,
        v: Tensor,
        eps: Tensor,
        v_old: Tensor,
        v_ref: Tensor | None,
        index: Tensor,
        steps: Tensor,
        advantages: Tensor,
        numbers: Sequence[float],
        tensors: Sequence[Tensor | None],
        choices: Sequence[int],
        reduction: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        _check_name(name, transitions=True)
        latents = {"v": v, "eps": eps, "v_old": v_old}, {"v_ref": v_ref}
        accumulate = check_latents("reverse_loss", *latents)
        check_like("index", index, v.shape[:1], torch.int64, v, "v")
        if steps is None:
            raise RuntimeError("steps is None; accepted is a tensor.")
        if steps.dim() != 2 or not steps.shape[0] or steps.shape[1] != _STEP_COLUMNS:
            raise RuntimeError(f"steps has shape {list(steps.shape)}; accepted is [steps + 2, {_STEP_COLUMNS}].")
        check_accumulate("steps", steps, v, accumulate)
        return _outputs(name, v, accumulate, advantages, numbers, tensors, choices, reduction)


def _check_name(name: str, transitions: bool) -> None:
    accepted = [loss for loss, (of_transitions, *_) in _LOSSES.items() if of_transitions == transitions]
    if name not in accepted:
        raise RuntimeError(f"name is {name!r}; accepted are {', '.join(map(repr, accepted))}.")


def _check_scores(name: str, column: Tensor | None, v: Tensor) -> None:
    if column is None:
        raise RuntimeError(f"{name} is None; accepted is a tensor.")
    if column.shape != v.shape[:1]:
        raise RuntimeError(f"{name} has shape {list(column.shape)}; accepted is [{v.shape[0]}].")
    check_float(name, column)
    check_device(name, column, v, "v")


def _outputs(
    name: str,
    v: Tensor,
    accumulate: torch.dtype,
    advantages: Tensor,
    numbers: Sequence[float],
    tensors: Sequence[Tensor | None],
    choices: Sequence[int],
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor]:
    batch = v.shape[0]
    _, number_count, choice_counts, metrics = _LOSSES[name]
    _check_scores("advantages", advantages, v)
    _check_count("numbers", numbers, number_count)
    _check_count("tensors", tensors, number_count)
    for k, tensor in enumerate(tensors):
        if tensor is None:
            continue
        if tensor.shape not in ((), (batch,)):
            raise RuntimeError(f"tensors[{k}] has shape {list(tensor.shape)}; accepted are [] and [{batch}].")
        check_float(f"tensors[{k}]", tensor)
        if tensor.dim() or tensor.device.type != "cpu":
            check_device(f"tensors[{k}]", tensor, v, "v")
    _check_count("choices", choices, len(choice_counts))
    for k, (choice, count) in enumerate(zip(choices, choice_counts, strict=True)):
        if not 0 <= choice < count:
            raise RuntimeError(f"choices[{k}] is {choice}; accepted are 0 to {count - 1}.")
    if reduction not in REDUCTIONS:
        raise RuntimeError(f"reduction is {reduction!r}; accepted are 'mean', 'sum' and 'none'.")
    loss = v.new_empty((batch,) if reduction == "none" else (), dtype=accumulate)
    return loss, loss.new_empty((batch, 3)), loss.new_empty((metrics,))


def _check_count(name: str, given: Sequence[object], accepted: int) -> None:
    if len(given) != accepted:
        raise RuntimeError(f"{name} has {len(given)} values; accepted are {accepted}.")


if _native.module is not None:
    _register_fakes()


def forward_loss(
    name: str,
    latents: Samples,
    t: Tensor,
    advantages: Tensor,
    numbers: Sequence[Number],
    choices: Sequence[int],
    reduction: str,
) -> tuple[Tensor, Tensor]:
    """The loss, ``[]`` or ``[B]``, with its gradient to ``v``, and the metrics, as :func:`loss_summary` orders them.

    ``t`` and ``advantages`` ``[B]`` may have any dtype that floats. What ``numbers`` and ``choices`` are is said in
    csrc/math/NAME.h; a number out of range, or not finite, drops its sample.
    """
    loss, _, metrics = torch.ops.advflow.forward_loss.default(
        name, *latents, t, advantages, *_split(numbers), choices, reduction
    )
    return loss, metrics


def reverse_loss(
    name: str,
    latents: Transitions,
    index: Tensor,
    steps: Tensor,
    advantages: Tensor,
    numbers: Sequence[Number],
    choices: Sequence[int],
    reduction: str,
) -> tuple[Tensor, Tensor]:
    """The same for transitions: step ``index[n]`` of each is row ``index[n] + 1`` of ``steps`` ``[steps + 2, 5]``.

    Its first and last row stand for what is outside the table. A step without noise drops its transition.
    """
    loss, _, metrics = torch.ops.advflow.reverse_loss.default(
        name, *latents, index, steps, advantages, *_split(numbers), choices, reduction
    )
    return loss, metrics


def _split(numbers: Sequence[Number]) -> tuple[list[float], list[Tensor | None]]:
    fixed = [0.0 if isinstance(number, Tensor) else number for number in numbers]
    return fixed, [number if isinstance(number, Tensor) else None for number in numbers]
