"""What a loss returns: the loss itself and its metrics, held in one device tensor."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor


class LossMetrics(NamedTuple):
    """Named scalars of one loss call, kept in one tensor so that a training step never waits for them.

    ``values`` is ``[len(names)]`` on the device of the loss; ``as_dict()`` is the only place that synchronises.
    Means run over the usable samples; a term whose tensor was not given is 0. Losses of the forward process have

    ==================== ==============================================================================
    loss                 mean per-sample loss, whatever ``reduction`` was asked for
    policy_term          mean of the advantage-weighted data term alone
    target_error         mean of <(v-u)^2>
    rollout_deviation    mean of <(v-v_old)^2>
    reference_deviation  mean of <(v-v_ref)^2>
    mean_advantage       mean of A
    mean_abs_advantage   mean of |A|
    min_curvature        smallest A + gamma + lam; at or below 0 the sample's loss has no minimum
    nonconvex_samples    how many usable samples have A + gamma + lam <= 0
    nonfinite_samples    how many were dropped because an input or their loss is not finite
    invalid_timesteps    how many were dropped because t is outside (0, 1]
    ==================== ==============================================================================
    """

    values: Tensor
    names: tuple[str, ...]

    def as_dict(self) -> dict[str, float]:
        """All metrics as Python floats; waits for the device once, and gives the warnings the step could not."""
        numbers = dict(zip(self.names, self.values.tolist(), strict=True))
        if numbers.get("nonconvex_samples", 0) > 0:
            warn_nonconvex(int(numbers["nonconvex_samples"]), numbers["min_curvature"], stacklevel=3)
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


class LossOutput(NamedTuple):
    """``loss``: a scalar, or ``[B]`` for reduction "none". ``metrics``: see :class:`LossMetrics`."""

    loss: Tensor
    metrics: LossMetrics


def summarise(
    losses: Tensor,  # [B]
    policy_term: Tensor,  # [B]
    deviations: Tensor,  # [B, 3]: vu, vo, vp
    advantages: Tensor,  # [B]
    curvature: Tensor,  # [B]
    nonconvex: Tensor,  # [B] bool
    finite: Tensor,  # [B] bool
    valid_t: Tensor,  # [B] bool
    usable: Tensor,  # [B] bool
) -> LossMetrics:
    """The metrics of the three-term loss in few launches: they run in every training step."""
    per_sample = torch.cat([torch.stack([losses, policy_term, advantages, advantages.abs()], 1), deviations], 1)
    counts = torch.stack([usable, nonconvex & usable, ~finite, ~valid_t], 1).sum(0, dtype=losses.dtype)
    means = torch.where(usable[:, None], per_sample, 0).sum(0) / counts[:1].clamp(min=1)
    if losses.shape[0] == 0:
        lowest = means.new_full((1,), torch.inf)
    else:
        lowest = torch.where(usable, curvature, torch.inf).amin(0, keepdim=True)
    loss_and_policy, advantage, deviation = means.split([2, 2, 3])
    return LossMetrics(torch.cat([loss_and_policy, deviation, advantage, lowest, counts[1:]]), FORWARD_METRICS)


def reduce_losses(losses: Tensor, reduction: str) -> Tensor:
    """Dropped samples stay in the denominator, so that they cannot change the weight of the others."""
    if reduction == "none":
        return losses
    total = losses.sum()
    return total if reduction == "sum" else total / max(losses.shape[0], 1)


_already_warned: set[str] = set()


def warn_nonconvex(count: int, lowest: float, stacklevel: int) -> None:
    if "nonconvex" in _already_warned:
        return
    _already_warned.add("nonconvex")
    warnings.warn(
        f"{count} sample(s) have A + gamma + lam <= 0 (smallest {lowest:.6g}): their loss is unbounded below and "
        "pushes the policy away without limit. Use gamma above the largest |A| (1.1 for advantages clipped to "
        '[-1, 1]) or gamma="1-A". Said once; metrics.nonconvex_samples keeps counting.',
        UserWarning,
        stacklevel=stacklevel,
    )
