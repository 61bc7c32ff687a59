"""The on-policy distillation loss of DiffusionOPD (arXiv 2605.15055) on the native core."""

from __future__ import annotations

import torch
from torch import Tensor

from advflow_ext import _native, reference
from advflow_ext._native import STATS
from advflow_ext.contract import checks
from advflow_ext.contract.numbers import Number
from advflow_ext.contract.outputs import DISTILLATION_METRICS, LossMetrics, LossOutput
from advflow_ext.contract.step_table import StepTable
from advflow_ext.kernels.loss_summary import loss_summary
from advflow_ext.kernels.residual import residual_loss, residual_stats
from advflow_ext.reference.distillation import distillation_arguments

_SQUARE = STATS.index("vu_sq")


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
    """How far the policy's transitions are from a teacher's, on states the policy visited itself (DiffusionOPD).

    With D elements and <.> the mean over them::

        loss = policy_weight f <(v-v_teacher)^2>,   d loss / dv = (2 / D) policy_weight f (v-v_teacher)

    where f = kappa^2 / 2 for ``form="sde"``, which makes it the KL divergence between the two transitions
    (:func:`gaussian_kl_from_velocity`), and f = c_v^2 / 2 for ``form="ode"``, half the mean squared distance of the two
    means, which deterministic steps have too.

    Arguments:
        v: policy velocity ``[N, ...]``, any rank from 2: the only tensor that receives a gradient.
        v_teacher: velocity of the teacher at the same x, shaped like v.
        table, index: as in :func:`flow_grpo_loss`; with ``form="ode"`` any step of the table.
        form: "sde", the KL divergence, or "ode", the distance of the means.
        policy_weight: at least 0, a number or a tensor ``[]`` or ``[N]``.
        reduction: "mean" over N, "sum", or "none" for ``[N]``.

    Dtypes, layouts, precision, bad samples and errors: as in :func:`flow_grpo_loss`. Metrics: ``loss``,
    ``teacher_deviation`` (mean of <(v-v_teacher)^2>), ``nonfinite_samples`` and ``invalid_steps``.
    """
    if not _native.serves(v, v_teacher, index):
        return reference.distillation_loss(
            v, v_teacher, table, index, form=form, policy_weight=policy_weight, reduction=reduction
        )
    factor, valid = distillation_arguments(v, v_teacher, table, index, form, policy_weight, reduction)
    checks.require_native_dtype(factor.dtype, v, "distillation_loss")
    stats = residual_stats(v, v_teacher, None, None, None)
    zero = torch.zeros_like(factor)
    summary = loss_summary(
        [factor * stats[:, _SQUARE]], [], zero, zero, stats, torch.stack([factor, zero, zero], 1), valid, ~valid,
        stat_means=1, largest=True, reduction=reduction, v=v.detach(),
    )  # fmt: skip
    loss = residual_loss(v, v_teacher, None, None, None, summary.loss, summary.coef)
    # Between the means and the counts stand those of advantages, which there are none of.
    metrics = torch.cat([summary.metrics[:2], summary.metrics[-2:]])
    return LossOutput(loss, LossMetrics(metrics, DISTILLATION_METRICS))
