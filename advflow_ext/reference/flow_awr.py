"""The FlowAWR loss (arXiv 2606.30376) in plain differentiable PyTorch, written as its public code does."""

from __future__ import annotations

import torch
from torch import Tensor

from advflow_ext.contract import checks
from advflow_ext.contract.batches import any_batch
from advflow_ext.contract.numbers import (
    Number,
    Numbers,
    per_sample,
)
from advflow_ext.contract.outputs import LossOutput
from advflow_ext.reference._forward import flatten, forward_output, mean


def flow_awr_arguments(
    v: Tensor,
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    advantages: Tensor,
    v_old: Tensor,
    v_ref: Tensor | None,
    kl_weight: Number,
    policy_weight: Number,
    weighting: str,
    reduction: str,
) -> tuple[torch.dtype, Numbers, Number, Number]:
    """The accumulate dtype, the numbers as they were read, kl_weight and policy_weight."""
    dtype = checks.require_samples(
        v, t, "advantages", advantages, reduction, x0=x0, noise=noise, v_old=v_old, v_ref=v_ref
    )
    checks.require_choice("weighting", weighting, checks.WEIGHTINGS)
    numbers = Numbers(v, dtype)
    kl = numbers.weight_of("kl_weight", kl_weight, "v_ref", v_ref, default=0.0)
    policy = numbers.read("policy_weight", policy_weight, low=0.0)
    return dtype, numbers, kl, policy


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
    """Same arguments, result and errors as :func:`advflow_ext.flow_awr_loss`, by PyTorch autograd.

    Unless ``weighting="velocity"``, x_t and the x0-predictions are formed as in the trainer. In float32 that costs
    digits as t goes to 0 (about 1e-7 / t relative), which the fused op does not lose.
    """
    dtype, numbers, kl_scale, policy_scale = flow_awr_arguments(
        v, x0, noise, t, advantages, v_old, v_ref, kl_weight, policy_weight, weighting, reduction
    )
    samples = checks.samples_in(dtype, t, advantages).usable_with(numbers)
    latents = flatten(samples, v, x0, noise, v_old, v_ref)
    assert latents.v_old is not None
    time, E = samples.t[:, None], samples.advantages[:, None]

    if weighting == "velocity":
        velocity, target = _reachable(latents.v, latents.v_old + E * (latents.u - latents.v_old))
        policy_term, curvature = mean((velocity - target).square()), torch.ones_like(samples.t)
    else:
        x_t = (1 - time) * latents.x0 + time * latents.noise
        x0_prediction, old_prediction = x_t - time * latents.v, x_t - time * latents.v_old
        x0_prediction, target = _reachable(x0_prediction, old_prediction + E * (latents.x0 - old_prediction))
        policy_term, curvature = mean((x0_prediction - target).square()), samples.t.square()
        if weighting == "adaptive":
            weight = mean((x0_prediction.detach() - latents.x0).abs()).clamp(min=1e-5)
            policy_term, curvature = policy_term / weight, curvature / weight
    policy_term = policy_scale * policy_term

    data_weight = policy_scale * curvature
    curvature = per_sample(data_weight + kl_scale, samples.t)
    reference = latents.deviation(latents.v_ref)
    with torch.no_grad():
        data, rollout = latents.deviation(latents.u), latents.deviation(latents.v_old)
    return forward_output(
        latents, samples, policy_term + kl_scale * reference, reduction,
        policy_term=policy_term, deviations=(data, rollout, reference),
        weights=(data_weight * samples.advantages, data_weight * (1 - samples.advantages), kl_scale),
        curvature=curvature, nonconvex=torch.zeros_like(samples.valid_t),
    )  # fmt: skip


def _reachable(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Both, but NaN without a gradient to v for the samples whose target has overflown."""
    with torch.no_grad():
        finite = torch.isfinite(torch.linalg.vector_norm(target, dim=1))[:, None]
    return torch.where(finite, prediction, torch.nan), torch.where(finite, target, 0)
