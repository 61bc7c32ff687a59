"""Reward-weighted flow matching (ORW-CFM-W2, RWR, RAFT) in plain differentiable PyTorch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from advflow_ext.contract import checks
from advflow_ext.contract.batches import any_batch
from advflow_ext.contract.numbers import (
    Number,
    Numbers,
)
from advflow_ext.contract.outputs import LossOutput
from advflow_ext.reference._forward import flatten, forward_output

UNBOUNDED = (
    "{count} sample(s) have reward + kl_weight < 0 (smallest {lowest:.6g}): their loss is unbounded below and pushes "
    'the policy away without limit. Use rewards of at least 0, or method="exp". Said once; metrics.nonconvex_samples '
    "keeps counting."
)

REWARD_METHODS = ("exp", "linear", "best")


class RewardNumbers(NamedTuple):
    tau: Number
    kl_weight: Number
    policy_weight: Number


def reward_weighted_arguments(
    v: Tensor,
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    rewards: Tensor,
    method: str,
    tau: Number,
    group_size: int | None,
    v_ref: Tensor | None,
    kl_weight: Number,
    policy_weight: Number,
    reduction: str,
) -> tuple[torch.dtype, Numbers, RewardNumbers]:
    dtype = checks.require_samples(v, t, "rewards", rewards, reduction, x0=x0, noise=noise, v_ref=v_ref)
    numbers = Numbers(v, dtype)
    checks.require_choice("method", method, REWARD_METHODS)
    given = RewardNumbers(
        numbers.read("tau", tau, low=0.0, exclusive=True),
        numbers.weight_of("kl_weight", kl_weight, "v_ref", v_ref, default=1.0),
        numbers.read("policy_weight", policy_weight, low=0.0),
    )
    if method == "best" or group_size is not None:
        checks.require_group_size(group_size, rewards)
    return dtype, numbers, given


@any_batch
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
    dtype, numbers, (scale, kl_scale, policy_scale) = reward_weighted_arguments(
        v, x0, noise, t, rewards, method, tau, group_size, v_ref, kl_weight, policy_weight, reduction
    )
    samples = checks.samples_in(dtype, t, rewards).usable_with(numbers)
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
    curvature = weights + kl_scale
    checks.warn_on_cpu(UNBOUNDED, curvature, curvature < 0)
    latents = flatten(samples, v, x0, noise, None, v_ref)
    fm_loss, w2_loss = latents.deviation(latents.u), latents.deviation(latents.v_ref)
    policy_term = weights * fm_loss
    return forward_output(
        latents, samples, policy_term + kl_scale * w2_loss, reduction,
        policy_term=policy_term, deviations=(fm_loss, torch.zeros_like(fm_loss), w2_loss),
        weights=(weights, 0.0, kl_scale),
        curvature=curvature, nonconvex=curvature < 0, unbounded=UNBOUNDED,
    )  # fmt: skip
