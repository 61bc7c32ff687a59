"""The Flow-GRPO loss (arXiv 2505.05470) on the native reverse-process core."""

from __future__ import annotations

from torch import Tensor

from advflow_ext import _native, reference
from advflow_ext.contract import checks
from advflow_ext.contract.numbers import Number
from advflow_ext.contract.outputs import LossOutput
from advflow_ext.contract.step_table import StepTable
from advflow_ext.ops._reverse import RATIOS, reverse_output
from advflow_ext.reference.flow_grpo import KL_CONVENTIONS, flow_grpo_arguments


def flow_grpo_loss(
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
    """Clipped policy gradient on the transitions of a stochastic sampler (Flow-GRPO; DanceGRPO, MixGRPO by ``table``).

    A transition x' = c_x x + c_v v_old + sigma eps is scored under the policy by what differs, so neither x nor a
    log-probability is needed. With kappa = c_v / sigma, D elements and <.> the mean over them::

        log r = kappa <eps (v-v_old)> - kappa^2 / 2 <(v-v_old)^2>         the released mean-reduced log-ratio
        KL_ref = kappa^2 / 2 <(v-v_ref)^2>
        loss = max(-A r, -A clip(r, 1 - clip, 1 + clip)) + kl_weight m KL_ref
        d loss / dv = A r kappa / D [kappa (v-v_old) - eps], or 0 where clipped, + kl_weight m kappa^2 / D (v-v_ref)

    Arguments:
        v: policy velocity ``[N, ...]``, N transitions of any rank from 2: the only tensor that receives a gradient.
        v_old: velocity of the rollout policy at the same x, shaped like v.
        eps: noise of the transition as :func:`sde_step` returns it, shaped like v: (x' - mean) / sigma after any
            rounding of x'.
        table: the rollout's :class:`StepTable`. index: the step in it of all transitions, or int64
            or int32 ``[N]``.
        advantages: ``[N]``, see :func:`group_advantages`; every transition of an image has the image's.
        clip: at least 0, below 1, or a pair (below, above) for 1-below and 1+above. Its unit is the mean-reduced ratio:
            1e-4 is 6.6 nats at D = 65536.
        v_ref: velocity of the reference policy, shaped like v, or None.
        kl_weight: weight of the reference term, at least 0; above 0 it needs v_ref.
        kl_convention: "exact" (m = 1, the paper's), "dt" (m = -dt, as yifan123/flow_grpo computes it) or
            "two_sigma_squared" (m = 2 sigma^2, the mean squared difference of IamCreateAI/FlowCPS).
        policy_weight: multiplies the policy term, at least 0.
        time_weight: multiplies it too, by the transition's own step: "none", "inverse_dt" (-1 / dt, GRPO-Guard),
            "sigma" (TempFlow-GRPO's with policy_weight 2.25) or "inverse_kappa" (1 / |kappa|, Flash-GRPO's before its
            normalisation).
        reduction: "mean" over N, "sum", or "none" for ``[N]``.

    clip, kl_weight and policy_weight are numbers or tensors ``[]`` or ``[N]``, which may change at every step under
    torch.compile. Latents may mix float32, float16 and bfloat16 freely and have any strides; sums are float32, and v's
    gradient is rounded once, to v's dtype. On CPU, one float64 latent makes everything float64. The clip is decided on
    log r, bounds included. The result is deterministic, and a transition's loss and gradient are bitwise independent of
    the batch around it.

    A transition with a non-finite input, ratio or loss has zero loss and gradient, is counted in ``metrics`` and leaves
    every other untouched.

    Raises ValueError, naming argument, value and what is accepted, for wrong shapes, dtypes, devices, names and
    numbers, and on CPU for a step that is deterministic or outside the table; on CUDA and under torch.compile such
    transitions are dropped and counted.
    """
    if not _native.serves(v, v_old, eps, index, advantages, v_ref):
        return reference.flow_grpo_loss(
            v, v_old, eps, table, index, advantages,
            clip=clip, v_ref=v_ref, kl_weight=kl_weight, kl_convention=kl_convention, policy_weight=policy_weight,
            time_weight=time_weight, reduction=reduction,
        )  # fmt: skip
    given, bounds = flow_grpo_arguments(
        v, v_old, eps, table, index, advantages, clip, v_ref, kl_weight, kl_convention, policy_weight, time_weight,
        reduction,
    )  # fmt: skip
    checks.require_native_dtype(given.dtype, v, "flow_grpo_loss")
    choices = (KL_CONVENTIONS.index(kl_convention), RATIOS.index("flow_grpo"))
    return reverse_output("flow_grpo", (v, eps, v_old, v_ref), given, (bounds.below, bounds.above), choices, reduction)
