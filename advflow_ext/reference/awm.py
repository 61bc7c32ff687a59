"""Advantage-weighted matching in plain differentiable PyTorch, after scxue/advantage_weighted_matching."""

from __future__ import annotations

import torch
from torch import Tensor

from advflow_ext.ops import _checks
from advflow_ext.ops._numbers import Number, per_sample
from advflow_ext.ops._outputs import LossOutput
from advflow_ext.ops.loss_summary import Ratio
from advflow_ext.reference._forward import flatten, forward_output, mean


def awm_loss(
    v: Tensor,
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    advantages: Tensor,
    *,
    v_ema: Tensor | None = None,
    v_ref: Tensor | None = None,
    log_prob_old: Tensor | None = None,
    weighting: str = "ghuber",
    power: Number = 0.25,
    draws: int = 1,
    clip: Number | tuple[Number, Number] = 1.0,
    ema_weight: Number = 1.0,
    kl_weight: Number = 0.0,
    policy_weight: Number = 1.0,
    reduction: str = "mean",
) -> LossOutput:
    """Same arguments, result and errors as :func:`advflow_ext.awm_loss`, by PyTorch autograd."""
    samples, numbers = _checks.awm_arguments(
        v, x0, noise, t, advantages, v_ema, v_ref, log_prob_old, weighting, power, draws, clip, ema_weight, kl_weight,
        policy_weight, reduction,
    )  # fmt: skip
    latents = flatten(samples, v, x0, noise, v_ema, v_ref)
    data, ema, reference = (latents.deviation(anchor) for anchor in (latents.u, latents.v_old, latents.v_ref))

    A, above, below = samples.advantages, numbers.clip.log_highest, numbers.clip.log_lowest
    distance = mean((latents.v - latents.u).detach().abs())
    slope = _slope(data.detach(), distance, samples.t, weighting, numbers.power)
    log_prob = _log_prob(data, distance, samples.t, weighting, numbers.power)
    log_ratio = log_prob - (log_prob if log_prob_old is None else log_prob_old.to(log_prob)).detach()
    if draws > 1:
        log_ratio = torch.where(samples.valid_t & latents.clean, log_ratio, torch.nan)
        log_ratio = log_ratio.view(-1, draws).mean(1).repeat_interleave(draws)
    # The pessimistic one of the ratio and the clipped ratio, chosen before exp can overflow.
    clipped = ((A > 0) & (log_ratio > above)) | ((A < 0) & (log_ratio < below))
    bound = torch.where(A > 0, per_sample(above, A), per_sample(below, A))
    bounded = torch.where(clipped, bound, log_ratio)
    with torch.no_grad():
        slope = torch.where(clipped, 0, numbers.policy_weight * A * slope * bounded.exp())
        fits = torch.isfinite(slope)  # where not, exp must stay out of the backward pass
    policy_term = torch.where(fits, -numbers.policy_weight * A * torch.where(fits, bounded, 0).exp(), torch.nan)
    losses = policy_term + numbers.ema_weight * ema + numbers.kl_weight * reference
    curvature = slope + numbers.ema_weight + numbers.kl_weight
    return forward_output(
        latents, samples, losses, reduction,
        policy_term=policy_term, deviations=(data, ema, reference),
        weights=(slope, numbers.ema_weight, numbers.kl_weight), curvature=curvature, nonconvex=curvature <= 0,
        extra={"mean_log_ratio": log_ratio.detach(), "clipped_fraction": clipped.to(A.dtype)},
        ratio=Ratio(log_ratio, below, above),
    )  # fmt: skip


@torch.no_grad()
def awm_log_prob(
    v: Tensor, x0: Tensor, noise: Tensor, t: Tensor, *, weighting: str = "ghuber", power: Number = 0.25
) -> Tensor:
    """Same arguments, result and errors as :func:`advflow_ext.awm_log_prob`."""
    t, exponent = _checks.awm_log_prob_arguments(v, x0, noise, t, weighting, power)
    error = v.flatten(1).to(t.dtype) - (noise.to(t.dtype) - x0.to(t.dtype)).flatten(1)
    return _log_prob(mean(error.square()), mean(error.abs()), t, weighting, exponent)


def _log_prob(L: Tensor, distance: Tensor, t: Tensor, weighting: str, power: Number) -> Tensor:
    """lp of the mean squared error L, ``distance`` the mean absolute one, a constant."""
    if weighting == "uniform":
        return -L
    if weighting == "t":
        return -L * t
    if weighting == "t2":
        return -L * t.square()
    if weighting == "adaptive":
        return -L * t.square() / (t * distance).clamp(min=1e-5)
    if weighting == "huber":
        return -((L + 1e-10).sqrt() - 1e-5) * t
    return -((L + 1e-10).pow(power) - 1e-10**power) * t / power


def _slope(L: Tensor, distance: Tensor, t: Tensor, weighting: str, power: Number) -> Tensor:
    """-d log-prob / dL, for the metrics and to see overflow; the gradient is autograd's."""
    if weighting == "uniform":
        return torch.ones_like(L)
    if weighting == "t":
        return t
    if weighting == "t2":
        return t.square()
    if weighting == "adaptive":
        return t.square() / (t * distance).clamp(min=1e-5)
    if weighting == "huber":
        return t / (2 * (L + 1e-10).sqrt())
    return t * (L + 1e-10).pow(power - 1)
