"""Argument checks of the ops on sampler steps, so that native and reference refuse the same calls."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from advflow_ext.contract import checks
from advflow_ext.contract.numbers import Number, Numbers, constant, values_are_at_hand
from advflow_ext.contract.step_table import StepRows, StepTable, listed_steps

TIME_WEIGHTS = ("inverse_dt", "none", "sigma", "inverse_kappa")
_SIGMA = StepRows._fields.index("sigma")


class TransitionScalars(NamedTuple):
    """What every reverse-process loss knows of its transitions, detached and in the accumulate dtype. All [N]."""

    step: StepRows  # harmless numbers where the step is not valid
    advantages: Tensor
    valid_step: Tensor  # bool: the step is in the table and stochastic
    policy_scale: Number  # of the policy term: policy_weight and time_weight
    kl_scale: Number  # what the loss adds of KL(policy || reference)


class TransitionArguments(NamedTuple):
    """What every reverse-process loss is called with, checked."""

    numbers: Numbers
    dtype: torch.dtype  # of sums
    table: StepTable
    step_index: Tensor
    advantages: Tensor
    kl_weight: Number
    policy_weight: Number
    time_weight: str

    def scalars(self) -> TransitionScalars:
        columns, valid_step = columns_of(self.table, self.step_index, self.dtype)
        step = StepRows(*torch.where(valid_step[:, None], columns, 1).unbind(1))
        policy_scale = self.policy_weight
        if self.time_weight == "inverse_dt":
            policy_scale = policy_scale / -step.dt
        elif self.time_weight == "sigma":
            policy_scale = policy_scale * step.sigma
        elif self.time_weight == "inverse_kappa":
            policy_scale = policy_scale / step.kappa.abs()
        advantages = self.numbers.contain(constant(self.advantages, self.dtype))
        return TransitionScalars(step, advantages, valid_step, policy_scale, self.kl_weight)


def transition_arguments(
    numbers: Numbers,
    v: Tensor,
    v_ref: Tensor | None,
    table: StepTable,
    index: int | Tensor,
    advantages: Tensor,
    kl_weight: Number,
    policy_weight: Number,
    time_weight: str,
    reduction: str,
    dtype: torch.dtype,
) -> TransitionArguments:
    checks.require_per_sample("advantages", advantages, v)
    kl_scale = numbers.weight_of("kl_weight", kl_weight, "v_ref", v_ref, default=0.0)
    policy_scale = numbers.read("policy_weight", policy_weight, low=0.0)
    checks.require_choice("time_weight", time_weight, TIME_WEIGHTS)
    checks.require_choice("reduction", reduction, checks.REDUCTIONS)
    steps = checked_steps(v, table, index)
    return TransitionArguments(numbers, dtype, table, steps, advantages, kl_scale, policy_scale, time_weight)


def steps_of(
    v: Tensor, table: StepTable, index: int | Tensor, dtype: torch.dtype, stochastic: bool = True
) -> tuple[Tensor, Tensor]:
    """``[N, 5]``, the columns of :class:`StepRows`, and which of them belong to a step that can be trained."""
    return columns_of(table, checked_steps(v, table, index, stochastic), dtype, stochastic)


def columns_of(table: StepTable, index: Tensor, dtype: torch.dtype, stochastic: bool = True) -> tuple[Tensor, Tensor]:
    columns = table.columns(index, dtype)
    sigma = columns[:, _SIGMA]
    return columns, sigma > 0 if stochastic else sigma >= 0  # false for the NaN of a step outside the table


def checked_steps(v: Tensor, table: StepTable, index: int | Tensor, stochastic: bool = True) -> Tensor:
    """The step of every transition, int64 ``[N]``."""
    steps = index_of_each(index, table, v)
    if not values_are_at_hand(steps):
        return steps
    accepted = set(table.stochastic_steps if stochastic else range(table.steps))
    for place, step in enumerate(steps.tolist()):
        if step in accepted:
            continue
        if 0 <= step < table.steps:
            reason = "a deterministic step (sigma = 0)"
        else:
            reason = f"outside the table of {table.steps} steps"
        among = f"steps 0 to {table.steps - 1}"
        if stochastic:
            among = f"stochastic steps {listed_steps(table.stochastic_steps) or '(none in this table)'}"
        raise ValueError(f"index[{place}] is {step}, {reason}; accepted are the {among}.")
    return steps


def require_table(table: object) -> None:
    if not isinstance(table, StepTable):
        raise ValueError(f"table is a {type(table).__name__}; accepted is a StepTable.")


def index_of_each(index: object, table: StepTable, v: Tensor) -> Tensor:
    """int64 ``[N]`` on the device of v, of one step for all, a number or 0-dimensional, or of one a transition."""
    require_table(table)
    if isinstance(index, Tensor):
        return _tensor_of_steps(index, v)
    is_step = isinstance(index, int) and not isinstance(index, bool)
    if not is_step or not 0 <= index < table.steps:  # type: ignore[operator]
        given = int(index) if is_step else repr(index)  # type: ignore[call-overload]  # a symbolic one prints only as an int
        raise ValueError(
            f"index is {given}; accepted are the steps 0 to {table.steps - 1} and an int64 or int32 tensor [] or [N]."
        )
    return v.new_full(v.shape[:1], index, dtype=torch.int64)  # type: ignore[arg-type]


def _tensor_of_steps(index: Tensor, v: Tensor) -> Tensor:
    if index.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"index is {index.dtype}; accepted is an int64 or int32 tensor, each transition's step.")
    single = index.dim() == 0
    if not single and index.shape != v.shape[:1]:
        raise ValueError(f"index has shape {list(index.shape)}; accepted is one step a transition, [{v.shape[0]}].")
    if index.device != v.device and not (single and index.device.type == "cpu"):
        raise ValueError(f"index is on {index.device}; accepted is the device of v, {v.device}.")
    if single:  # a copy: what is expanded is no [N] to a kernel
        return index.detach().to(v.device, torch.int64, non_blocking=True).expand(v.shape[:1]).contiguous()
    return index.to(torch.int64)
