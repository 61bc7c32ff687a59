"""The GRPO-Guard loss (arXiv 2510.22319) on the native reverse-process core."""

from __future__ import annotations

from torch import Tensor

from advflow_ext import _native, reference
from advflow_ext.contract import checks
from advflow_ext.contract.numbers import Number
from advflow_ext.contract.outputs import LossOutput
from advflow_ext.contract.step_table import StepTable
from advflow_ext.ops._reverse import RATIOS, reverse_output
from advflow_ext.reference.flow_grpo import flow_grpo_arguments


def grpo_guard_loss(
    v: Tensor,
    v_old: Tensor,
    eps: Tensor,
    table: StepTable,
    index: int | Tensor,
    advantages: Tensor,
    *,
    clip: Number | tuple[Number, Number] = 2e-6,
    v_ref: Tensor | None = None,
    kl_weight: Number = 0.0,
    policy_weight: Number = 1.0,
    time_weight: str = "inverse_dt",
    reduction: str = "mean",
) -> LossOutput:
    """Flow-GRPO's clipped policy gradient on a ratio normalised to be centred and alike at every step (GRPO-Guard).

    RatioNorm, sigma (log r + KL_old), is exactly one statistic, with standard deviation rms(c_v (v-v_old)) / sqrt(D)
    whatever the schedule::

        log r = c_v <eps (v-v_old)>
        loss = w max(-A r, -A clip(r, 1 - clip, 1 + clip)) + kl_weight KL_ref
        d loss / dv = -w A r c_v / D eps, or 0 where clipped, + kl_weight kappa^2 / D (v-v_ref)

    ``time_weight`` is "inverse_dt" (w = -1 / dt, yifan123/flow_grpo, train_sd3_GRPO_Guard.py), "none" (w = 1,
    X-GenGroup/Flow-Factory) or another of :func:`flow_grpo_loss`. The drift, sigma and dt are each transition's own;
    flow_grpo (@9745241) takes their means over the batch, which is the same only in a batch of one. ``clip`` is 2e-6
    there for OCR and GenEval, 4e-6 for PickScore. Other arguments, result and errors are those of
    :func:`flow_grpo_loss`; the reference term is the exact KL and carries no time weight.
    """
    if not _native.serves(v, v_old, eps, index, advantages, v_ref):
        return reference.grpo_guard_loss(
            v, v_old, eps, table, index, advantages,
            clip=clip, v_ref=v_ref, kl_weight=kl_weight, policy_weight=policy_weight, time_weight=time_weight,
            reduction=reduction,
        )  # fmt: skip
    given, bounds = flow_grpo_arguments(
        v, v_old, eps, table, index, advantages, clip, v_ref, kl_weight, "exact", policy_weight, time_weight, reduction
    )
    checks.require_native_dtype(given.dtype, v, "grpo_guard_loss")
    choices = (0, RATIOS.index("grpo_guard"))
    return reverse_output("flow_grpo", (v, eps, v_old, v_ref), given, (bounds.below, bounds.above), choices, reduction)
