"""The FlowAWR loss (arXiv 2606.30376) on the native forward-process core."""

from __future__ import annotations

import torch
from torch import Tensor

from advflow_ext import _native, reference
from advflow_ext.ops import _checks
from advflow_ext.ops._forward import forward_output
from advflow_ext.ops._numbers import Number, per_sample
from advflow_ext.ops._outputs import LossOutput
from advflow_ext.ops.residual import residual_stats


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
    reduction: str = "mean",
) -> LossOutput:
    """Regression of the velocity on a target that the advantage moves away from the rollout policy (FlowAWR).

    Per sample, with u = noise - x0, D elements and <.> the mean over them::

        loss_i = <(v - v_target)^2> + kl_weight <(v - v_ref)^2>,   v_target = v_old + A (u - v_old)
        d loss_i / dv = (2 / D) [ A (v-u) + (1-A) (v-v_old) + kl_weight (v-v_ref) ]

    in velocity space without time weight: the gradient of ``advantage_flow_loss(gamma="1-A", weighting="velocity")``.
    The coefficients add up to 1 + kl_weight, so every sample's loss has a minimum, also for the advantages far above 1
    that the paper's map gives.

    Arguments:
        v, x0, noise, t, v_ref, reduction: as in :func:`advantage_flow_loss`; v is the only tensor with a gradient, and
            t is only checked.
        advantages: ``[B]``, the paper's are :func:`softmax_advantages` of the rewards.
        v_old: velocity of the rollout policy, shaped like v.
        kl_weight: weight of the reference term, at least 0.

    Dtypes, layouts, precision, non-finite samples, t outside (0, 1] and errors: as in :func:`advantage_flow_loss`.
    ``policy_term`` in the metrics is the loss without the reference term. No official code is public; the regression
    follows the paper.
    """
    if not _native.serves(v, x0, noise, t, advantages, v_old, v_ref):
        return reference.flow_awr_loss(
            v,
            x0,
            noise,
            t,
            advantages,
            v_old=v_old,
            v_ref=v_ref,
            kl_weight=kl_weight,
            policy_weight=policy_weight,
            reduction=reduction,
        )
    samples, kl_scale, scale = _checks.flow_awr_arguments(
        v, x0, noise, t, advantages, v_old, v_ref, kl_weight, policy_weight, reduction
    )
    _checks.require_native_dtype(samples.t.dtype, v, "flow_awr_loss")
    stats = residual_stats(v, x0, noise, v_old, v_ref)
    vu_sq, vo_sq, vp_sq, ou_sq = stats[:, :4].unbind(1)

    A = samples.advantages
    kl = per_sample(kl_scale, A)
    policy_term = scale * (A * vu_sq + (1 - A) * (vo_sq - A * ou_sq))
    curvature = scale + kl
    return forward_output(
        (v, x0, noise, v_old, v_ref), stats, samples, policy_term + kl * vp_sq,
        torch.stack([scale * A, scale * (1 - A), kl], 1), reduction,
        policy_term=policy_term, curvature=curvature, nonconvex=curvature <= 0,
    )  # fmt: skip
