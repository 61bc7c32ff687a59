"""The Flow-CPS loss (arXiv 2509.05952) on the native reverse-process core."""

from __future__ import annotations

from torch import Tensor

from advflow_ext import _native, reference
from advflow_ext.contract import checks
from advflow_ext.contract.numbers import Number
from advflow_ext.contract.outputs import LossOutput
from advflow_ext.contract.step_table import StepTable
from advflow_ext.ops._reverse import RATIOS, reverse_output
from advflow_ext.reference.flow_grpo import KL_CONVENTIONS, flow_grpo_arguments


def flow_cps_loss(
    v: Tensor,
    v_old: Tensor,
    eps: Tensor,
    table: StepTable,
    index: int | Tensor,
    advantages: Tensor,
    *,
    clip: Number | tuple[Number, Number] = 1e-4,
    v_ref: Tensor | None = None,
    kl_weight: Number = 0.0,
    kl_convention: str = "exact",
    policy_weight: Number = 1.0,
    time_weight: str = "none",
    reduction: str = "mean",
) -> LossOutput:
    """Flow-GRPO's clipped policy gradient on a ratio whose log-probabilities have their variance dropped.

    IamCreateAI/FlowCPS scores a transition by -<(x' - mean)^2>, so that its log-ratio is 2 sigma^2 times the true one::

        log r = 2 sigma c_v <eps (v-v_old)> - c_v^2 <(v-v_old)^2>
        d loss / dv = 2 A r c_v / D [c_v (v-v_old) - sigma eps], or 0 where clipped, + the reference term

    The clip is looser in true nats the smaller sigma is; :func:`flow_grpo_loss` with a "cps" table has the true ratio.
    Arguments, the loss around the ratio, result and errors are those of :func:`flow_grpo_loss`. That repository's KL to
    the reference is ``kl_convention="two_sigma_squared"``.
    """
    if not _native.serves(v, v_old, eps, index, advantages, v_ref):
        return reference.flow_cps_loss(
            v, v_old, eps, table, index, advantages,
            clip=clip, v_ref=v_ref, kl_weight=kl_weight, kl_convention=kl_convention, policy_weight=policy_weight,
            time_weight=time_weight, reduction=reduction,
        )  # fmt: skip
    given, bounds = flow_grpo_arguments(
        v, v_old, eps, table, index, advantages, clip, v_ref, kl_weight, kl_convention, policy_weight, time_weight,
        reduction,
    )  # fmt: skip
    checks.require_native_dtype(given.dtype, v, "flow_cps_loss")
    choices = (KL_CONVENTIONS.index(kl_convention), RATIOS.index("flow_cps"))
    return reverse_output("flow_grpo", (v, eps, v_old, v_ref), given, (bounds.below, bounds.above), choices, reduction)
