"""The Flow-DPPO loss (arXiv 2606.11025) on the native reverse-process core."""

from __future__ import annotations

from torch import Tensor

from advflow_ext import _native, reference
from advflow_ext.contract import checks
from advflow_ext.contract.numbers import Number
from advflow_ext.contract.outputs import LossOutput
from advflow_ext.contract.step_table import StepTable
from advflow_ext.ops._reverse import reverse_output
from advflow_ext.reference.flow_dppo import DIRECTIONS, MASKS, flow_dppo_arguments


def flow_dppo_loss(
    v: Tensor,
    v_old: Tensor,
    eps: Tensor,
    table: StepTable,
    index: int | Tensor,
    advantages: Tensor,
    *,
    threshold: Number = 1e-6,
    direction: str = "ratio",
    mask: str = "current",
    step_size: Number | None = None,
    v_ref: Tensor | None = None,
    kl_weight: Number = 0.0,
    policy_weight: Number = 1.0,
    time_weight: str = "none",
    reduction: str = "mean",
) -> LossOutput:
    """Policy gradient masked where it leads further away from a rollout policy that is already far (Flow-DPPO).

    With log r and KL_ref as in :func:`flow_grpo_loss` and KL = kappa^2 / 2 <(v-v_old)^2> (eq. 17-18, 20, 23)::

        M = 0 where A log r > 0 and KL >= threshold, 1 elsewhere (in particular for A = 0 or r = 1)
        loss = -M A r + kl_weight KL_ref
        d loss / dv = M A r kappa / D [kappa (v-v_old) - eps] + kl_weight kappa^2 / D (v-v_ref)

    The reference term is not masked, and a masked transition stays in the denominator of reduction "mean". A KL equal
    to the threshold counts as large, as Tencent-Hunyuan/UniRL, verl-project/verl-omni and X-GenGroup/Flow-Factory have
    it; the paper's text has a strict >.

    Arguments, beyond those of :func:`flow_grpo_loss`, whose result and errors hold here too:
        threshold: at least 0, in mean-reduced KL. The paper uses 1e-7 with Flow-SDE and 1e-6 with CPS (App. F.2),
            UniRL's recipe 1e-5.
        direction: "ratio", sign of A log r, or "log_ratio_minus_kl", sign of A (log r - KL): which way the KL itself
            moves under one step on the surrogate (App. E).
        mask: "current" thresholds the KL; "predictive" thresholds the KL after one step of ``step_size`` on the mean of
            the transition (eq. 24, App. E): with s = step_size A r / sigma^2,
            KL + s (log r - KL) + s^2 / 2 <(x' - mean)^2> / sigma^2.
        step_size: above 0, for mask "predictive" alone: the step on the mean per unit of A (x' - mean) / sigma^2.
    """
    if not _native.serves(v, v_old, eps, index, advantages, v_ref):
        return reference.flow_dppo_loss(
            v, v_old, eps, table, index, advantages,
            threshold=threshold, direction=direction, mask=mask, step_size=step_size,
            v_ref=v_ref, kl_weight=kl_weight, policy_weight=policy_weight, time_weight=time_weight, reduction=reduction,
        )  # fmt: skip
    given, limit, size = flow_dppo_arguments(
        v, v_old, eps, table, index, advantages, threshold, direction, mask, step_size, v_ref, kl_weight, policy_weight,
        time_weight, reduction,
    )  # fmt: skip
    checks.require_native_dtype(given.dtype, v, "flow_dppo_loss")
    numbers = (limit, 0.0 if size is None else size)
    choices = (DIRECTIONS.index(direction), MASKS.index(mask))
    return reverse_output("flow_dppo", (v, eps, v_old, v_ref), given, numbers, choices, reduction)
