"""Advantage-weighted matching in plain differentiable PyTorch, after scxue/advantage_weighted_matching."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from advflow_ext.contract import checks
from advflow_ext.contract.batches import any_batch
from advflow_ext.contract.numbers import (
    ClipRange,
    Number,
    Numbers,
    constant,
    per_sample,
    values_are_at_hand,
)
from advflow_ext.contract.outputs import LossOutput, Ratio
from advflow_ext.reference._forward import flatten, forward_output, mean

AWM_WEIGHTINGS = ("uniform", "t", "t2", "huber", "ghuber", "adaptive")
AWM_SPELLINGS = {"Uniform": "uniform", "t**2": "t2"}  # scxue/advantage_weighted_matching's, and Flow-Factory's


class AwmNumbers(NamedTuple):
    power: Number
    clip: ClipRange
    ema_weight: Number
    kl_weight: Number
    policy_weight: Number


def awm_arguments(
    v: Tensor,
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    advantages: Tensor,
    v_ema: Tensor | None,
    v_ref: Tensor | None,
    log_prob_old: Tensor | None,
    weighting: str,
    power: Number,
    draws: int,
    clip: Number | tuple[Number, Number],
    ema_weight: Number,
    kl_weight: Number,
    policy_weight: Number,
    reduction: str,
) -> tuple[checks.Samples, AwmNumbers]:
    samples = checks.samples_of(v, t, "advantages", advantages, reduction, x0=x0, noise=noise, v_ema=v_ema, v_ref=v_ref)
    numbers = Numbers(v, samples.t.dtype)
    given = AwmNumbers(
        _awm_power(numbers, weighting, power),
        numbers.clip("clip", clip, exclusive=True),
        numbers.weight_of("ema_weight", ema_weight, "v_ema", v_ema, default=1.0),
        numbers.weight_of("kl_weight", kl_weight, "v_ref", v_ref, default=0.0),
        numbers.read("policy_weight", policy_weight, low=0.0),
    )
    samples = samples.usable_with(numbers)
    if log_prob_old is not None:
        checks.require_per_sample("log_prob_old", log_prob_old, v)
        samples = samples.usable_with(numbers, constant(log_prob_old, samples.t.dtype))
    return _one_advantage_an_image(samples, draws), given


def awm_log_prob_arguments(
    v: Tensor, x0: Tensor, noise: Tensor, t: Tensor, weighting: str, power: Number
) -> tuple[Tensor, Number]:
    """t in the accumulate dtype, and the power."""
    dtype = checks.require_latents(v, x0=x0, noise=noise)
    numbers = Numbers(v, dtype)
    exponent = _awm_power(numbers, weighting, power)
    checks.require_timesteps(t, v, dtype)
    return numbers.contain(constant(t, dtype)), exponent


def _awm_power(numbers: Numbers, weighting: str, power: Number) -> Number:
    checks.require_choice("weighting", weighting, AWM_WEIGHTINGS)
    return numbers.read("power", power, low=0.0, exclusive=True)


def _one_advantage_an_image(samples: checks.Samples, draws: int) -> checks.Samples:
    if isinstance(draws, bool) or not isinstance(draws, int) or draws < 1:
        raise ValueError(f"draws is {draws!r}; accepted is an integer of at least 1.")
    if draws == 1:
        return samples
    A = samples.advantages
    if A.shape[0] % draws:
        raise ValueError(f"advantages has shape {list(A.shape)}; accepted is [N*draws], a multiple of draws {draws}.")
    first = A[::draws].repeat_interleave(draws)
    other = A.isfinite() & first.isfinite() & (A != first)
    if values_are_at_hand(A) and other.any():
        row = int(other.nonzero()[0])
        raise ValueError(
            f"advantages[{row}] is {A[row].item():.6g} beside {first[row].item():.6g} of the same image; accepted is "
            f"one advantage for the {draws} consecutive draws of an image."
        )
    return samples._replace(advantages=torch.where(other, torch.nan, A))


@any_batch
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
    weighting = checks.spelled(weighting, AWM_SPELLINGS)
    samples, numbers = awm_arguments(
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


@any_batch
def awm_log_prob(
    v: Tensor, x0: Tensor, noise: Tensor, t: Tensor, *, weighting: str = "ghuber", power: Number = 0.25
) -> Tensor:
    """Same arguments, result and errors as :func:`advflow_ext.awm_log_prob`, by PyTorch autograd."""
    weighting = checks.spelled(weighting, AWM_SPELLINGS)
    t, exponent = awm_log_prob_arguments(v, x0, noise, t, weighting, power)
    target = (noise.detach().to(t.dtype) - x0.detach().to(t.dtype)).flatten(1)
    error = v.flatten(1).to(t.dtype) - target
    with torch.no_grad():
        L, distance = mean(error.square()), mean(error.abs())
        values = _log_prob(L, distance, t, weighting, exponent)
        usable = torch.isfinite(values) & torch.isfinite(_slope(L, distance, t, weighting, exponent))
    # The mask sits at the entrance: the backward of `where` writes exact zeros there, whatever is infinite behind it.
    data = mean(torch.where(usable[:, None], error, 0).square())
    time = torch.where(usable, t, 1)
    return torch.where(usable, _log_prob(data, distance, time, weighting, exponent), values)


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
