"""Reward-weighted flow matching (ORW-CFM-W2, RWR, RAFT) in plain differentiable PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from advflow_ext.ops import _checks
from advflow_ext.ops._numbers import Number
from advflow_ext.ops._outputs import LossOutput
from advflow_ext.reference._forward import flatten, forward_output


def reward_weighted_loss(
    v: Tensor,
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    rewards: Tensor,
    *,
    method: str = "exp",
    tau: Number = 0.5,
    group_size: int | None = None,
    v_ref: Tensor | None = None,
    kl_weight: Number = 1.0,
    policy_weight: Number = 1.0,
    reduction: str = "mean",
) -> LossOutput:
    """Same arguments, result and errors as :func:`advflow_ext.reward_weighted_loss`, by PyTorch autograd."""
    samples, (scale, kl_scale, policy_scale), unbounded = _checks.reward_weighted_arguments(
        v, x0, noise, t, rewards, method, tau, group_size, v_ref, kl_weight, policy_weight, reduction
    )
    R = samples.advantages
    if method == "exp":
        weights = torch.exp(scale * R)
    elif method == "linear":
        weights = R
    else:
        assert group_size is not None
        candidates = torch.where(torch.isfinite(R), R, -torch.inf)
        largest = candidates.view(-1, group_size).amax(1).repeat_interleave(group_size)
        weights = torch.where(R == largest, 1.0, 0.0).to(R)

    weights = policy_scale * weights
    samples = samples._replace(required=(*samples.required, weights))
    latents = flatten(samples, v, x0, noise, None, v_ref)
    fm_loss, w2_loss = latents.deviation(latents.u), latents.deviation(latents.v_ref)
    policy_term = weights * fm_loss
    curvature = weights + kl_scale
    return forward_output(
        latents, samples, policy_term + kl_scale * w2_loss, reduction,
        policy_term=policy_term, deviations=(fm_loss, torch.zeros_like(fm_loss), w2_loss),
        weights=(weights, 0.0, kl_scale),
        curvature=curvature, nonconvex=curvature < 0, unbounded=unbounded,
    )  # fmt: skip
