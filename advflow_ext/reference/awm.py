"""Advantage-weighted matching in plain differentiable PyTorch, after scxue/advantage_weighted_matching."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from advflow_ext.ops import _checks
from advflow_ext.ops._outputs import LossOutput
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
    power: float = 0.25,
    clip: float = 1.0,
    ema_weight: float = 1.0,
    kl_weight: float = 0.0,
    reduction: str = "mean",
) -> LossOutput:
    """Same arguments, result and errors as :func:`advflow_ext.awm_loss`, by PyTorch autograd."""
    samples = _checks.awm_arguments(
        v, x0, noise, t, advantages, v_ema, v_ref, log_prob_old, weighting, power, clip, ema_weight, kl_weight,
        reduction,
    )  # fmt: skip
    latents = flatten(samples, v, x0, noise, v_ema, v_ref)
    data, ema, reference = (latents.deviation(anchor) for anchor in (latents.u, latents.v_old, latents.v_ref))

    A = samples.advantages
    log_prob = _log_prob(data, samples.t, weighting, power)
    log_ratio = log_prob - (log_prob if log_prob_old is None else log_prob_old.to(log_prob)).detach()
    # The pessimistic one of the ratio and the clipped ratio, chosen before exp can overflow.
    lowest = math.log1p(-clip) if clip < 1 else -math.inf
    bounded = torch.where(A > 0, log_ratio.clamp(max=math.log1p(clip)), log_ratio.clamp(min=lowest))
    with torch.no_grad():
        active = bounded == log_ratio
        slope = torch.where(active, A * _slope(data, samples.t, weighting, power) * bounded.exp(), 0)
        fits = torch.isfinite(slope)  # where not, exp must stay out of the backward pass
    policy_term = torch.where(fits, -A * torch.where(fits, bounded, 0).exp(), torch.nan)
    losses = policy_term + ema_weight * ema + kl_weight * reference
    curvature = slope + (ema_weight if v_ema is not None else 0.0) + (kl_weight if v_ref is not None else 0.0)
    return forward_output(
        latents, samples, losses, reduction,
        policy_term=policy_term, deviations=(data, ema, reference), curvature=curvature, nonconvex=curvature <= 0,
        extra={"mean_log_ratio": log_ratio.detach(), "clipped_fraction": (~active).to(A.dtype)},
    )  # fmt: skip


@torch.no_grad()
def awm_log_prob(
    v: Tensor, x0: Tensor, noise: Tensor, t: Tensor, *, weighting: str = "ghuber", power: float = 0.25
) -> Tensor:
    """Same arguments, result and errors as :func:`advflow_ext.awm_log_prob`."""
    t = _checks.awm_log_prob_arguments(v, x0, noise, t, weighting, power)
    velocity, target = v.flatten(1).to(t.dtype), (noise.to(t.dtype) - x0.to(t.dtype)).flatten(1)
    return _log_prob(mean((velocity - target).square()), t, weighting, power)


def _log_prob(L: Tensor, t: Tensor, weighting: str, power: float) -> Tensor:
    if weighting == "uniform":
        return -L
    if weighting == "t":
        return -L * t
    if weighting == "t2":
        return -L * t.square()
    if weighting == "huber":
        return -((L + 1e-10).sqrt() - 1e-5) * t
    return -((L + 1e-10).pow(power) - math.pow(1e-10, power)) * t / power


def _slope(L: Tensor, t: Tensor, weighting: str, power: float) -> Tensor:
    """-d log-prob / dL, for the metrics and to see overflow; the gradient is autograd's."""
    if weighting == "uniform":
        return torch.ones_like(L)
    if weighting == "t":
        return t
    if weighting == "t2":
        return t.square()
    if weighting == "huber":
        return t / (2 * (L + 1e-10).sqrt())
    return t * (L + 1e-10).pow(power - 1)
