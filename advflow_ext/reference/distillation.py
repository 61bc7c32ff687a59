"""The on-policy distillation loss of DiffusionOPD (arXiv 2605.15055) in plain differentiable PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from advflow_ext.contract import checks, transitions
from advflow_ext.contract.numbers import (
    Number,
    Numbers,
)
from advflow_ext.contract.outputs import DISTILLATION_METRICS, LossMetrics, LossOutput
from advflow_ext.contract.step_table import StepRows, StepTable
from advflow_ext.reference._forward import mean
from advflow_ext.reference._summary import reduce_losses

FORMS = ("sde", "ode")


def distillation_arguments(
    v: Tensor,
    v_teacher: Tensor,
    table: StepTable,
    index: int | Tensor,
    form: str,
    policy_weight: Number,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    """The factor of <(v-v_teacher)^2> ``[N]``, and which steps can be trained."""
    checks.require_latent("v", v)
    checks.require_like_v("v_teacher", v_teacher, v)
    checks.require_choice("form", form, FORMS)
    checks.require_choice("reduction", reduction, checks.REDUCTIONS)
    dtype = checks.accumulate_dtype(v, v_teacher)
    numbers = Numbers(v, dtype)
    weight = numbers.read("policy_weight", policy_weight, low=0.0)
    columns, valid = transitions.steps_of(v, table, index, dtype, stochastic=form == "sde")
    step = StepRows(*torch.where(valid[:, None], columns, 1).unbind(1))
    factor = weight * (step.kappa if form == "sde" else step.c_v).square() / 2
    return numbers.contain(factor), valid


def distillation_loss(
    v: Tensor,
    v_teacher: Tensor,
    table: StepTable,
    index: int | Tensor,
    *,
    form: str = "sde",
    policy_weight: Number = 1.0,
    reduction: str = "mean",
) -> LossOutput:
    """Same arguments, result and errors as :func:`advflow_ext.distillation_loss`, by PyTorch autograd."""
    factor, valid = distillation_arguments(v, v_teacher, table, index, form, policy_weight, reduction)
    difference = v.flatten(1).to(factor.dtype) - v_teacher.detach().flatten(1).to(factor.dtype)
    with torch.no_grad():
        finite = torch.isfinite(factor * mean(difference.square())) & torch.isfinite(factor)
    usable = finite & valid
    # The mask sits at the entrance: the backward of `where` writes exact zeros there, whatever is infinite behind it.
    distance = mean(torch.where(usable[:, None], difference, 0).square())
    losses = torch.where(usable, factor, 0) * distance
    totals = torch.stack([losses, distance]).detach().sum(1) / usable.sum().clamp(min=1)
    counts = torch.stack([~finite, ~valid]).sum(1, dtype=totals.dtype)
    metrics = LossMetrics(torch.cat([totals, counts]), DISTILLATION_METRICS)
    return LossOutput(reduce_losses(losses, reduction), metrics)
