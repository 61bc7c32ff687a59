"""What the plain PyTorch forms of the reverse-process losses share: transitions as Gaussians, and the output."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from advflow_ext.contract.numbers import ClipRange, Number, per_sample
from advflow_ext.contract.outputs import TRANSITION_METRICS, LossMetrics, LossOutput, Ratio
from advflow_ext.contract.transitions import TransitionScalars
from advflow_ext.reference._forward import mean
from advflow_ext.reference._summary import gradient_fits, reduce_losses, summarise


def log_prob(x: Tensor, mu: Tensor, sigma: Tensor) -> Tensor:
    """``[N]``: the log-density of ``[N, D]`` under N(mu, sigma^2), averaged over D; sigma is ``[N, 1]``."""
    return mean(-(x - mu).square() / (2 * sigma.square()) - sigma.log() - math.log(2 * math.pi) / 2)


class Transitions(NamedTuple):
    """Transitions as ``[N, D]`` Gaussians in the accumulate dtype; only ``mu`` carries a gradient, where ``clean``.

    Every mean has the same c_x x in it, which no loss sees, so x is taken to be 0.
    """

    mu: Tensor
    mu_old: Tensor
    mu_ref: Tensor | None
    sigma: Tensor  # [N, 1]
    x_next: Tensor
    source: Tensor  # v as it was given
    clean: Tensor  # [N] bool: nothing given for the transition is NaN, infinite or of infinite square

    def log_ratio(self) -> Tensor:
        return log_prob(self.x_next, self.mu, self.sigma) - log_prob(self.x_next, self.mu_old, self.sigma)

    def kl(self, anchor: Tensor | None) -> Tensor:
        """The mean-reduced KL to the same step from ``anchor``, 0 for an absent one (arXiv 2606.11025 eq. 14, 20)."""
        if anchor is None:
            return torch.zeros_like(self.sigma[:, 0])
        return mean((self.mu - anchor).square() / (2 * self.sigma.square()))


def transitions_of(
    scalars: TransitionScalars, v: Tensor, v_old: Tensor, eps: Tensor, v_ref: Tensor | None
) -> Transitions:
    def flat(latent: Tensor) -> Tensor:
        return latent.flatten(1).to(scalars.advantages.dtype)

    policy, old, noise = flat(v), flat(v_old.detach()), flat(eps.detach())
    reference = None if v_ref is None else flat(v_ref.detach())
    # The mask sits at the entrance because the backward of `where` writes exact zeros there, whatever NaN arises
    # further on. Finite norms also mean that no difference below is infinite.
    with torch.no_grad():
        present = [latent for latent in (policy, old, noise, reference) if latent is not None]
        norms = torch.stack([torch.linalg.vector_norm(latent, dim=1) for latent in present])
        clean = torch.isfinite(norms.sum(0) + scalars.advantages)
    policy = torch.where(clean[:, None], policy, 0)

    c_v, sigma = scalars.step.c_v[:, None], scalars.step.sigma[:, None]
    mu_old = c_v * old
    mu_ref = None if reference is None else c_v * reference
    return Transitions(c_v * policy, mu_old, mu_ref, sigma, mu_old + sigma * noise, v, clean)


def finite_ratio(log_ratio: Tensor, clean: Tensor) -> tuple[Tensor, Tensor]:
    """The log-ratio, 0 where its exponential is not a number one can compute with, and where that is not so.

    Selecting after the exponential is too late: its backward would still multiply 0 by infinity.
    """
    finite = clean & torch.isfinite(log_ratio.detach()) & torch.isfinite(log_ratio.detach().exp())
    return torch.where(finite, log_ratio, 0), finite


def clipped_surrogate(log_ratio: Tensor, advantages: Tensor, clip: ClipRange) -> tuple[Tensor, Tensor]:
    """The PPO surrogate as a loss, and where the clip is what decides it."""
    ratio = log_ratio.exp()
    lowest, highest = per_sample(1 - clip.below, ratio), per_sample(1 + clip.above, ratio)
    unclipped, clipped = -advantages * ratio, -advantages * ratio.clamp(lowest, highest)
    return torch.maximum(unclipped, clipped), clipped > unclipped


def reverse_output(
    at: Transitions,
    scalars: TransitionScalars,
    log_ratio: Tensor,  # [N]
    policy_term: Tensor,  # [N]
    masked: Tensor,  # [N] bool
    finite: Tensor,  # [N] bool
    reduction: str,
    *,
    steepness: Number = 1.0,  # of the method's log-ratio beside the true one's
    clip: ClipRange | None = None,
) -> LossOutput:
    kl_old, kl_ref = at.kl(at.mu_old), at.kl(at.mu_ref)
    unweighted, policy_term = policy_term, scalars.policy_scale * policy_term
    losses = policy_term + scalars.kl_scale * kl_ref
    finite = finite & torch.isfinite(losses.detach() + kl_old.detach())
    with torch.no_grad():
        # d log-ratio / dv = kappa (eps - kappa (v-v_old)) / D, and what is left of kappa (v-v_old) is its KL.
        kappa = scalars.step.kappa
        slope = torch.where(masked, 0, scalars.policy_scale * scalars.advantages * log_ratio.exp())
        noise = mean(((at.x_next - at.mu_old) / at.sigma).square())
        along = slope * steepness * kappa / 2
        squares = (noise, 2 * kl_old, 2 * kl_ref)
        finite = finite & gradient_fits((along, along, scalars.kl_scale * kappa / 2), squares, at.source)
    losses = torch.where(finite & scalars.valid_step, losses, 0)
    metrics = summarise(
        [losses, policy_term, unweighted, log_ratio, kl_old, kl_ref],
        scalars.advantages,
        log_ratio,
        masked,
        finite,
        scalars.valid_step,
        largest=True,
        contrast=kl_old,
        ratio=Ratio(log_ratio, *((clip.log_lowest, clip.log_highest) if clip else ())),
    )
    return LossOutput(reduce_losses(losses, reduction), LossMetrics(metrics, TRANSITION_METRICS))
