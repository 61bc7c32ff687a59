"""Argument checks of the ops on sampler steps, so that native and reference refuse the same calls."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from advflow_ext.ops import _checks
from advflow_ext.ops._numbers import ClipRange, Number, Numbers, constant, require_number, values_are_at_hand
from advflow_ext.ops.step_table import StepRows, StepTable, listed_steps

KL_CONVENTIONS = ("exact", "dt", "two_sigma_squared")
TIME_WEIGHTS = ("inverse_dt", "none", "sigma", "inverse_kappa")
DIRECTIONS = ("ratio", "log_ratio_minus_kl")
MASKS = ("current", "predictive")
FORMS = ("sde", "ode")
_SIGMA = StepRows._fields.index("sigma")


class TransitionScalars(NamedTuple):
    """What every reverse-process loss knows of its transitions, detached and in the accumulate dtype. All [N]."""

    step: StepRows  # harmless numbers where the step is not valid
    advantages: Tensor
    valid_step: Tensor  # bool: the step is in the table and stochastic
    policy_scale: Number  # of the policy term: policy_weight and time_weight
    kl_scale: Number  # what the loss adds of KL(policy || reference)


def flow_grpo_arguments(
    v: Tensor,
    v_old: Tensor,
    eps: Tensor,
    table: StepTable,
    index: Tensor,
    advantages: Tensor,
    clip: Number | tuple[Number, Number],
    v_ref: Tensor | None,
    kl_weight: Number,
    kl_convention: str,
    policy_weight: Number,
    time_weight: str,
    reduction: str,
) -> tuple[TransitionScalars, ClipRange]:
    """Flow-CPS and, without a KL convention of its own, GRPO-Guard take the same arguments."""
    dtype = _require_latents(v, v_old, eps, v_ref)
    numbers = Numbers(v, dtype)
    bounds = numbers.clip("clip", clip, most=1.0)
    _checks.require_choice("kl_convention", kl_convention, KL_CONVENTIONS)
    scalars = _transitions(
        numbers, v, v_ref, table, index, advantages, kl_weight, policy_weight, time_weight, reduction, dtype
    )
    if kl_convention == "dt":
        scalars = scalars._replace(kl_scale=scalars.kl_scale * -scalars.step.dt)
    elif kl_convention == "two_sigma_squared":
        scalars = scalars._replace(kl_scale=scalars.kl_scale * (2 * scalars.step.sigma.square()))
    return scalars, bounds


def flow_dppo_arguments(
    v: Tensor,
    v_old: Tensor,
    eps: Tensor,
    table: StepTable,
    index: Tensor,
    advantages: Tensor,
    threshold: Number,
    direction: str,
    mask: str,
    step_size: Number | None,
    v_ref: Tensor | None,
    kl_weight: Number,
    policy_weight: Number,
    time_weight: str,
    reduction: str,
) -> tuple[TransitionScalars, Number, Number | None]:
    """The scalars, the threshold and the step size."""
    dtype = _require_latents(v, v_old, eps, v_ref)
    numbers = Numbers(v, dtype)
    limit = numbers.read("threshold", threshold, low=0.0)
    _checks.require_choice("direction", direction, DIRECTIONS)
    _checks.require_choice("mask", mask, MASKS)
    step = None
    if mask == "predictive":
        step = numbers.read("step_size", step_size, low=0.0, exclusive=True)
    elif step_size is not None:
        raise ValueError(f"step_size is {step_size!r}; accepted with mask 'current' is None.")
    scalars = _transitions(
        numbers, v, v_ref, table, index, advantages, kl_weight, policy_weight, time_weight, reduction, dtype
    )
    return scalars, limit, step


def distillation_arguments(
    v: Tensor, v_teacher: Tensor, table: StepTable, index: Tensor, form: str, policy_weight: Number, reduction: str
) -> tuple[Tensor, Tensor]:
    """The factor of <(v-v_teacher)^2> ``[N]``, and which steps can be trained."""
    _checks.require_latent("v", v)
    _checks.require_like_v("v_teacher", v_teacher, v)
    _checks.require_choice("form", form, FORMS)
    _checks.require_choice("reduction", reduction, _checks.REDUCTIONS)
    dtype = _checks.accumulate_dtype(v, v_teacher)
    numbers = Numbers(v, dtype)
    weight = numbers.read("policy_weight", policy_weight, low=0.0)
    columns, valid = _steps(v, table, index, dtype, stochastic=form == "sde")
    step = StepRows(*torch.where(valid[:, None], columns, 1).unbind(1))
    factor = weight * (step.kappa if form == "sde" else step.c_v).square() / 2
    return numbers.contain(factor), valid


def sde_step_arguments(
    v: Tensor,
    x: Tensor,
    table: StepTable,
    index: int | Tensor,
    noise: Tensor | None,
    generator: torch.Generator | None,
    dtype: torch.dtype | None,
) -> tuple[StepRows, torch.dtype]:
    """The coefficients, one row a sample, and the dtype of the next x."""
    _checks.require_latent("v", v)
    _checks.require_like_v("x", x, v)
    if noise is not None:
        _checks.require_like_v("noise", noise, v)
    if generator is not None:
        if not isinstance(generator, torch.Generator):
            raise ValueError(f"generator is a {type(generator).__name__}; accepted are a torch.Generator and None.")
        if noise is not None:
            raise ValueError("generator is given beside noise; accepted is one of them, or neither.")
        if generator.device.type != v.device.type:
            raise ValueError(f"generator is on {generator.device}; accepted is the device of v, {v.device}.")
    if dtype is not None and dtype not in _checks.FLOAT_DTYPES:
        raise ValueError(f"dtype is {dtype!r}; accepted are float32, float16, bfloat16, float64 and None.")
    _require_table(table)
    if isinstance(index, Tensor):
        _require_index(index, v)
    else:
        is_step = isinstance(index, int) and not isinstance(index, bool)
        if not is_step or not 0 <= index < table.steps:
            given = int(index) if is_step else repr(index)  # a symbolic one prints only as an int
            raise ValueError(
                f"index is {given}; accepted are the steps 0 to {table.steps - 1} and an int64 tensor [N]."
            )
        index = v.new_full(v.shape[:1], index, dtype=torch.int64)
    if values_are_at_hand(index) and (wrong := (index < 0) | (index >= table.steps)).any():
        first = int(wrong.nonzero()[0])
        raise ValueError(f"index[{first}] is {int(index[first])}; accepted are the steps 0 to {table.steps - 1}.")
    dtype = dtype or x.dtype
    accumulate = torch.float64 if dtype == torch.float64 else _checks.accumulate_dtype(v, x, noise)
    return table.rows(index, accumulate), dtype


def gaussian_kl_arguments(
    mean1: Tensor, mean2: Tensor, std1: float | Tensor, std2: float | Tensor | None
) -> tuple[Tensor, Tensor]:
    """Both standard deviations in float64, ``[N]``: the difference of their logarithms cancels."""
    _checks.require_latent("mean1", mean1)
    _checks.require_float_tensor("mean2", mean2)
    if mean2.shape != mean1.shape:
        raise ValueError(f"mean2 has shape {list(mean2.shape)}; accepted is that of mean1, {list(mean1.shape)}.")
    if mean2.device != mean1.device:
        raise ValueError(f"mean2 is on {mean2.device}; accepted is the device of mean1, {mean1.device}.")
    first = _std_per_sample("std1", std1, mean1)
    return first, first if std2 is None else _std_per_sample("std2", std2, mean1)


def _std_per_sample(name: str, std: float | Tensor, mean: Tensor) -> Tensor:
    if not isinstance(std, Tensor):
        require_number(name, std, low=0.0, exclusive=True)
        # An addition: torch.full would keep the number in a graph, which one that changes compiles anew.
        return mean.new_zeros(mean.shape[:1], dtype=torch.float64) + 1.0 * std
    single = std.dim() == 0
    here = std.device == mean.device or (single and std.device.type == "cpu")
    if not std.is_floating_point() or not (single or std.shape == mean.shape[:1]) or not here:
        raise ValueError(
            f"{name} is {std.dtype} {list(std.shape)} on {std.device}; accepted are a number and a floating-point "
            f"tensor [{mean.shape[0]}] on {mean.device}."
        )
    std = std.detach().to(mean.device, torch.float64).expand(mean.shape[:1])
    if values_are_at_hand(std) and (wrong := ~((std > 0) & std.isfinite())).any():
        first = int(wrong.nonzero()[0])
        raise ValueError(f"{name}[{first}] is {std[first].item():.6g}; accepted are numbers above 0 that are finite.")
    return std


def velocity_kl_arguments(v: Tensor, v_old: Tensor, table: StepTable, index: Tensor) -> Tensor:
    """kappa of the transitions in the accumulate dtype."""
    _checks.require_latent("v", v)
    _checks.require_like_v("v_old", v_old, v)
    columns, _ = _steps(v, table, index, _checks.accumulate_dtype(v, v_old))
    return StepRows(*columns.unbind(1)).kappa


def _require_latents(v: Tensor, v_old: Tensor, eps: Tensor, v_ref: Tensor | None) -> torch.dtype:
    """The accumulate dtype of latents that fit together."""
    _checks.require_latent("v", v)
    _checks.require_like_v("v_old", v_old, v)
    _checks.require_like_v("eps", eps, v)
    if v_ref is not None:
        _checks.require_like_v("v_ref", v_ref, v)
    return _checks.accumulate_dtype(v, v_old, eps, v_ref)


def _transitions(
    numbers: Numbers,
    v: Tensor,
    v_ref: Tensor | None,
    table: StepTable,
    index: Tensor,
    advantages: Tensor,
    kl_weight: Number,
    policy_weight: Number,
    time_weight: str,
    reduction: str,
    dtype: torch.dtype,
) -> TransitionScalars:
    _checks.require_per_sample("advantages", advantages, v)
    kl_scale = numbers.weight_of("kl_weight", kl_weight, "v_ref", v_ref, default=0.0)
    policy_scale = numbers.read("policy_weight", policy_weight, low=0.0)
    _checks.require_choice("time_weight", time_weight, TIME_WEIGHTS)
    _checks.require_choice("reduction", reduction, _checks.REDUCTIONS)
    columns, valid_step = _steps(v, table, index, dtype)
    step = StepRows(*torch.where(valid_step[:, None], columns, 1).unbind(1))
    if time_weight == "inverse_dt":
        policy_scale = policy_scale / -step.dt
    elif time_weight == "sigma":
        policy_scale = policy_scale * step.sigma
    elif time_weight == "inverse_kappa":
        policy_scale = policy_scale / step.kappa.abs()
    return TransitionScalars(step, numbers.contain(constant(advantages, dtype)), valid_step, policy_scale, kl_scale)


def _steps(
    v: Tensor, table: StepTable, index: Tensor, dtype: torch.dtype, stochastic: bool = True
) -> tuple[Tensor, Tensor]:
    """``[N, 5]``, the columns of :class:`StepRows`, and which of them belong to a step that can be trained."""
    _require_table(table)
    _require_index(index, v)
    columns = table.columns(index, dtype)
    sigma = columns[:, _SIGMA]
    valid = sigma > 0 if stochastic else sigma >= 0  # false for the NaN of a step outside the table
    if values_are_at_hand(index) and not valid.all():
        first = int((~valid).nonzero()[0])
        step = int(index[first])
        if 0 <= step < table.steps:
            reason = "a deterministic step (sigma = 0)"
        else:
            reason = f"outside the table of {table.steps} steps"
        accepted = f"steps 0 to {table.steps - 1}"
        if stochastic:
            accepted = f"stochastic steps {listed_steps(table.stochastic_steps) or '(none in this table)'}"
        raise ValueError(f"index[{first}] is {step}, {reason}; accepted are the {accepted}.")
    return columns, valid


def _require_table(table: object) -> None:
    if not isinstance(table, StepTable):
        raise ValueError(f"table is a {type(table).__name__}; accepted is a StepTable.")


def _require_index(index: object, v: Tensor) -> None:
    if not isinstance(index, Tensor) or index.dtype != torch.int64:
        kind = index.dtype if isinstance(index, Tensor) else f"a {type(index).__name__}"
        raise ValueError(f"index is {kind}; accepted is an int64 tensor, each transition's step in the table.")
    if index.shape != v.shape[:1]:
        raise ValueError(f"index has shape {list(index.shape)}; accepted is one step a transition, [{v.shape[0]}].")
    if index.device != v.device:
        raise ValueError(f"index is on {index.device}; accepted is the device of v, {v.device}.")
