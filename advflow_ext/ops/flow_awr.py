"""The FlowAWR loss (arXiv 2606.30376) on the native forward-process core."""

from __future__ import annotations

from torch import Tensor

from advflow_ext import _native, reference
from advflow_ext.contract import checks
from advflow_ext.contract.batches import any_batch
from advflow_ext.contract.numbers import Number
from advflow_ext.contract.outputs import LossOutput
from advflow_ext.ops._forward import native_output
from advflow_ext.reference.flow_awr import flow_awr_arguments


@any_batch
def flow_awr_loss(
    v: Tensor,
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    advantages: Tensor,
    *,
    v_old: Tensor,
    v_ref: Tensor | None = None,
    kl_weight: Number = 0.0,
    policy_weight: Number = 1.0,
    weighting: str = "adaptive",
    reduction: str = "mean",
) -> LossOutput:
    """Regression on a target that the advantage moves away from the rollout policy (FlowAWR), as coded in
    Fuzm7/FlowAWR @05e993a (train_awr_sd3.py).

    Per sample, with u = noise - x0, D elements, <.> the mean over them and E = ``advantages``::

        loss_i = m <(v - v_target)^2> + kl_weight <(v - v_ref)^2>,   v_target = v_old + E (u - v_old)
        d loss_i / dv = (2 / D) [ m E (v-u) + m (1-E) (v-v_old) + kl_weight (v-v_ref) ]

    The released code has the first term in x0-predictions f, whose residuals are -t times these: <(f - f_target)^2> / w
    with f_target = f_old + E (x0 - f_old) and w = max(<|f - x0|>, 1e-5), so m = t^2 / w. The reference term stands
    outside that weight, in velocity space. With kl_weight = 0 the gradient is that of ``advantage_flow_loss`` with
    ``gamma="1-A", lam=0`` and the same weighting. The coefficients add up to m + kl_weight, so every sample's loss has
    a minimum, whatever its advantage.

    Arguments:
        v, x0, noise, t, v_ref, reduction: as in :func:`advantage_flow_loss`; v is the only tensor with a gradient.
        advantages: ``[B]``, E; the released code's are :func:`softmax_advantages` of the rewards.
        v_old: velocity of the rollout policy, shaped like v.
        kl_weight: weight of the reference term, at least 0, in velocity space (the trainer's ``train.beta``, 1e-4).
        policy_weight: multiplies m, at least 0.
        weighting: "adaptive" (m = t^2 / w with w = max(t <|v-u|>, 1e-5) treated as a constant: the released code),
            "prediction" (m = t^2), or "velocity" (m = 1: the paper's regression of velocities, arXiv 2606.30376).

    Dtypes, layouts, precision, non-finite samples, t outside (0, 1] and errors: as in :func:`advantage_flow_loss`. The
    released code takes w in float64; here it is not rounded below float32. ``policy_term`` in the metrics is the loss
    without the reference term; ``min_curvature`` is the smallest m + kl_weight.
    """
    if not _native.serves(v, x0, noise, t, advantages, v_old, v_ref):
        return reference.flow_awr_loss(
            v, x0, noise, t, advantages,
            v_old=v_old, v_ref=v_ref, kl_weight=kl_weight, policy_weight=policy_weight, weighting=weighting,
            reduction=reduction,
        )  # fmt: skip
    dtype, _, *given = flow_awr_arguments(
        v, x0, noise, t, advantages, v_old, v_ref, kl_weight, policy_weight, weighting, reduction
    )
    checks.require_native_dtype(dtype, v, "flow_awr_loss")
    choices = (checks.WEIGHTINGS.index(weighting),)
    return native_output("flow_awr", (v, x0, noise, v_old, v_ref), t, advantages, given, choices, reduction)
