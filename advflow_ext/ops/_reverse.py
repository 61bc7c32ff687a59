"""What every reverse-process loss shares: the clipped surrogate, and its turn into a loss, its gradient and metrics.

A log-ratio is formed as its difference, linear <eps (v-v_old)> - quadratic <(v-v_old)^2>: two log-probabilities
subtracted lose it in their rounding. Ratios are clipped before the exponential, where float32 still tells 2e-6 from 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from advflow_ext.contract.numbers import ClipRange, per_sample
from advflow_ext.contract.outputs import TRANSITION_METRICS, LossMetrics, LossOutput, Ratio
from advflow_ext.contract.transitions import TransitionScalars
from advflow_ext.kernels.loss_summary import loss_summary
from advflow_ext.kernels.residual import TransitionStats, transition_loss

Latents = tuple[Tensor, Tensor, Tensor, Tensor | None]  # v, eps, v_old, v_ref


class Surrogate(NamedTuple):
    """The policy term of every transition, all [N]."""

    log_ratio: Tensor
    ratio: Tensor
    value: Tensor
    slope: Tensor  # d value / d log_ratio
    masked: Tensor  # bool
    clip: ClipRange | None = None


def clipped_surrogate(log_ratio: Tensor, advantages: Tensor, clip: ClipRange) -> Surrogate:
    """max(-A r, -A clip(r, 1 - below, 1 + above)); a ratio on the bound still has its gradient."""
    ratio = log_ratio.exp()
    over = (advantages > 0) & (log_ratio > clip.log_highest)
    under = (advantages < 0) & (log_ratio < clip.log_lowest)
    masked = over | under
    unclipped = -advantages * ratio
    distance = clip.above
    if clip.below is not clip.above:
        distance = torch.where(advantages > 0, per_sample(clip.above, ratio), per_sample(clip.below, ratio))
    value = torch.where(masked, -advantages - distance * advantages.abs(), unclipped)
    return Surrogate(log_ratio, ratio, value, torch.where(masked, 0, unclipped), masked, clip)


def reverse_output(
    latents: Latents,
    scalars: TransitionScalars,
    stats: TransitionStats,
    surrogate: Surrogate,
    linear: Tensor,  # [N]
    quadratic: Tensor,  # [N]
    reduction: str,
) -> LossOutput:
    half_kappa_sq = scalars.step.kappa.square() / 2
    kl_old, kl_ref = half_kappa_sq * stats.vo_sq, half_kappa_sq * stats.vp_sq
    policy_term, slope = scalars.policy_scale * surrogate.value, scalars.policy_scale * surrogate.slope
    values = policy_term + scalars.kl_scale * kl_ref
    coef = torch.stack([slope * linear / 2, -slope * quadratic, scalars.kl_scale * half_kappa_sq], 1)
    clip = surrogate.clip
    summary = loss_summary(
        [values, policy_term, surrogate.value, surrogate.log_ratio, kl_old, kl_ref],
        [surrogate.ratio],
        scalars.advantages,
        surrogate.log_ratio,
        stats.table,
        coef,
        scalars.valid_step,
        surrogate.masked,
        stat_means=0,
        largest=True,
        reduction=reduction,
        ratio=Ratio(surrogate.log_ratio, *((clip.log_lowest, clip.log_highest) if clip else ())),
        v=latents[0].detach(),
        eps_first=True,
        contrast=True,
    )
    loss = transition_loss(*latents, summary.loss, summary.coef)
    return LossOutput(loss, LossMetrics(summary.metrics, TRANSITION_METRICS))
