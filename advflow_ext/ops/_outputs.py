"""What a loss returns: the loss itself and its metrics, held in one device tensor."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class LossMetrics(NamedTuple):
    """Named scalars of one loss call, kept in one tensor so that a training step never waits for them.

    ``values`` is ``[len(names)]`` on the device of the loss; ``as_dict()`` is the only place that synchronises.
    Means run over the usable samples; a term whose tensor was not given is 0. Losses of the forward process have

    ==================== ==============================================================================
    loss                 mean per-sample loss, whatever ``reduction`` was asked for
    policy_term          mean of what the advantages act on, without the separate pulls to other policies
    target_error         mean of <(v-u)^2>
    rollout_deviation    mean of <(v-v_old)^2>
    reference_deviation  mean of <(v-v_ref)^2>
    mean_advantage       mean of A
    mean_abs_advantage   mean of |A|
    min_curvature        smallest curvature a + b + c of a sample's loss (AdvantageFlow: beta A + gamma + lam)
    nonconvex_samples    how many usable samples have a curvature that leaves their quadratic without a minimum
    nonfinite_samples    how many were dropped because an input or their loss is not finite
    invalid_timesteps    how many were dropped because t is outside (0, 1]
    ==================== ==============================================================================

    (:func:`awm_loss` adds ``mean_log_ratio`` and ``clipped_fraction``), and losses of the reverse process, where a
    sample is one sampler step,

    ==================== ==============================================================================
    loss                 mean per-sample loss, whatever ``reduction`` was asked for
    policy_term          mean of the advantage-weighted term alone, after clipping or masking
    mean_log_ratio       mean of the log-ratio as the method forms it
    max_abs_log_ratio    largest magnitude of the same
    mean_kl_old          mean of the exact KL to the rollout policy, kappa^2 / 2 <(v-v_old)^2>
    mean_kl_ref          mean of the exact KL to the reference policy, kappa^2 / 2 <(v-v_ref)^2>
    masked_samples       how many usable samples have no policy gradient because of the clip or the mask
    mean_advantage       mean of A
    mean_abs_advantage   mean of |A|
    nonfinite_samples    how many were dropped because an input, their ratio or their loss is not finite
    invalid_steps        how many were dropped because their step is deterministic or not in the table
    ==================== ==============================================================================
    """

    values: Tensor
    names: tuple[str, ...]
    unbounded: str = ""  # what to say of nonconvex samples where that makes the loss unbounded below

    def as_dict(self) -> dict[str, float]:
        """All metrics as Python floats; waits for the device once, and gives the warnings the step could not."""
        numbers = dict(zip(self.names, self.values.tolist(), strict=True))
        if self.unbounded and numbers["nonconvex_samples"] > 0:
            warn_nonconvex(self.unbounded, int(numbers["nonconvex_samples"]), numbers["min_curvature"], stacklevel=3)
        return numbers


FORWARD_METRICS = (
    "loss",
    "policy_term",
    "target_error",
    "rollout_deviation",
    "reference_deviation",
    "mean_advantage",
    "mean_abs_advantage",
    "min_curvature",
    "nonconvex_samples",
    "nonfinite_samples",
    "invalid_timesteps",
)


TRANSITION_METRICS = (
    "loss",
    "policy_term",
    "mean_log_ratio",
    "max_abs_log_ratio",
    "mean_kl_old",
    "mean_kl_ref",
    "masked_samples",
    "mean_advantage",
    "mean_abs_advantage",
    "nonfinite_samples",
    "invalid_steps",
)


class LossOutput(NamedTuple):
    """``loss``: a scalar, or ``[B]`` for reduction "none". ``metrics``: see :class:`LossMetrics`."""

    loss: Tensor
    metrics: LossMetrics


class SdeStep(NamedTuple):
    """One step of a sampler: see :func:`advflow_ext.sde_step`."""

    x_next: Tensor
    eps: Tensor
    log_prob: Tensor


def summarise(
    losses: Tensor,  # [B]
    policy_term: Tensor,  # [B]
    deviations: Tensor,  # [B, 3]: vu, vo, vp
    advantages: Tensor,  # [B]
    curvature: Tensor,  # [B]
    nonconvex: Tensor,  # [B] bool
    finite: Tensor,  # [B] bool
    valid_t: Tensor,  # [B] bool
    *,
    unbounded: str = "",
    extra: Mapping[str, Tensor] | None = None,  # [B] each, reported as means
) -> LossMetrics:
    """The metrics of a forward-process loss in few launches: they run in every training step."""
    extra = extra or {}
    usable = finite & valid_t
    columns = torch.stack([losses, policy_term, advantages, advantages.abs(), *extra.values()], 1)
    per_sample = torch.cat([columns, deviations], 1)
    counts = torch.stack([usable, nonconvex & usable, ~finite, ~valid_t], 1).sum(0, dtype=losses.dtype)
    means = torch.where(usable[:, None], per_sample, 0).sum(0) / counts[:1].clamp(min=1)
    if losses.shape[0] == 0:
        lowest = means.new_full((1,), torch.inf)
    else:
        lowest = torch.where(usable, curvature, torch.inf).amin(0, keepdim=True)
    loss_and_policy, advantage, others, deviation = means.split([2, 2, len(extra), 3])
    values = torch.cat([loss_and_policy, deviation, advantage, lowest, counts[1:], others])
    return LossMetrics(values, (*FORWARD_METRICS, *extra), unbounded)


def summarise_transitions(
    losses: Tensor,  # [N]
    policy_term: Tensor,  # [N]
    log_ratio: Tensor,  # [N]
    kl_old: Tensor,  # [N]
    kl_ref: Tensor,  # [N]
    advantages: Tensor,  # [N]
    masked: Tensor,  # [N] bool
    finite: Tensor,  # [N] bool
    valid_step: Tensor,  # [N] bool
) -> LossMetrics:
    """The metrics of a loss of the reverse process in few launches: they run in every training step."""
    usable = finite & valid_step
    per_sample = torch.stack([losses, policy_term, log_ratio, kl_old, kl_ref, advantages, advantages.abs()], 1)
    per_sample = torch.where(usable[:, None], per_sample, 0)
    counts = torch.stack([usable, masked & usable, ~finite, ~valid_step], 1).sum(0, dtype=losses.dtype)
    means = per_sample.sum(0) / counts[:1].clamp(min=1)
    largest = per_sample[:, 2].abs().amax(0, keepdim=True) if losses.shape[0] else means.new_zeros(1)
    until_ratio, divergences, advantage = means.split([3, 2, 2])
    return LossMetrics(
        torch.cat([until_ratio, largest, divergences, counts[1:2], advantage, counts[2:]]), TRANSITION_METRICS
    )


def reduce_losses(losses: Tensor, reduction: str) -> Tensor:
    """Dropped samples stay in the denominator, so that they cannot change the weight of the others."""
    if reduction == "none":
        return losses
    total = losses.sum()
    return total if reduction == "sum" else total / max(losses.shape[0], 1)


_already_warned: set[str] = set()


def warn_nonconvex(message: str, count: int, lowest: float, stacklevel: int) -> None:
    if message in _already_warned:
        return
    _already_warned.add(message)
    warnings.warn(message.format(count=count, lowest=lowest), UserWarning, stacklevel=stacklevel)
