"""What a loss returns: the loss itself and its metrics, held in one device tensor."""

from __future__ import annotations

import warnings
from typing import Literal, NamedTuple

from torch import Tensor

from advflow_ext.contract.numbers import Number, values_are_at_hand

# Of a ratio r of two policies' probabilities.
RATIO_METRICS = (
    "approx_kl",
    "ratio_mean",
    "ratio_std",
    "ratio_min",
    "ratio_max",
    "clipped_above",
    "clipped_below",
)


# How metrics of parts of a batch become those of the whole: a mean weighted by the parts' shares, the root of that of
# squares, the sum of counts, the smallest or the largest.
Join = Literal["mean", "root_mean_square", "sum", "min", "max"]
JOINS: dict[str, Join] = {
    "loss": "mean",
    "policy_term": "mean",
    "unweighted_policy": "mean",
    "clipped_fraction": "mean",
    "target_error": "mean",
    "rollout_deviation": "mean",
    "reference_deviation": "mean",
    "teacher_deviation": "mean",
    "mean_log_ratio": "mean",
    "mean_kl_old": "mean",
    "mean_kl_ref": "mean",
    "mean_advantage": "mean",
    "mean_abs_advantage": "mean",
    "min_curvature": "min",
    "max_abs_log_ratio": "max",
    "masked_samples": "sum",
    "nonconvex_samples": "sum",
    "nonfinite_samples": "sum",
    "invalid_timesteps": "sum",
    "invalid_steps": "sum",
    "contrast_alive": "mean",
    "mean_entropy": "mean",
    "invalid_sequences": "sum",
    "approx_kl": "mean",
    "ratio_mean": "mean",
    "ratio_std": "root_mean_square",
    "ratio_min": "min",
    "ratio_max": "max",
    "clipped_above": "mean",
    "clipped_below": "mean",
}


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
    contrast_alive       share of samples with v != v_old: 0 where learner and rollout policy are one
    ==================== ==============================================================================

    (:func:`awm_loss` adds ``mean_log_ratio``, ``clipped_fraction`` and the metrics of a ratio), and losses of the
    reverse process, where a sample is one sampler step,

    ==================== ==============================================================================
    loss                 mean per-sample loss, whatever ``reduction`` was asked for
    policy_term          mean of the advantage-weighted term alone, after clipping or masking
    unweighted_policy    the same before policy_weight and time_weight
    mean_log_ratio       mean of the log-ratio as the method forms it
    mean_kl_old          mean of the exact KL to the rollout policy, kappa^2 / 2 <(v-v_old)^2>
    mean_kl_ref          mean of the exact KL to the reference policy, kappa^2 / 2 <(v-v_ref)^2>
    mean_advantage       mean of A
    mean_abs_advantage   mean of |A|
    max_abs_log_ratio    largest magnitude of the log-ratio
    masked_samples       how many usable samples have no policy gradient because of the clip or the mask
    nonfinite_samples    how many were dropped because an input, their ratio or their loss is not finite
    invalid_steps        how many were dropped because their step is deterministic or not in the table
    contrast_alive       share of transitions with v != v_old
    ==================== ==============================================================================

    and :func:`token_policy_loss`, where a sample is the sequence of tokens of an image,

    ==================== ==============================================================================
    loss                 mean per-sequence loss, whatever ``reduction`` was asked for
    policy_term          mean of the advantage-weighted term alone, after clipping
    mean_entropy         mean entropy of a token's distribution, in nats
    mean_log_ratio       mean of the log-ratio of a token to the rollout policy
    mean_kl_ref          mean of the KL term to the reference policy, as ``kl`` forms it
    mean_advantage       mean of A, or of the sum of several
    mean_abs_advantage   mean of its magnitude
    max_abs_log_ratio    largest magnitude of the log-ratio that is clipped, of a sequence or of a token
    clipped_fraction     share of the policy term's parts, one an advantage and ratio, that the clip leaves no gradient
    nonfinite_samples    how many were dropped because an input, their loss or their gradient is not finite
    invalid_sequences    how many were dropped because the mask leaves no token, or one is not in the vocabulary
    ==================== ==============================================================================

    The latter two have the metrics of their ratio r, as public trainers log them:

    ==================== ==============================================================================
    approx_kl            mean of (log r)^2 / 2
    ratio_mean           mean of r
    ratio_std            its standard deviation, which has digits where float32 rounds r to 1
    ratio_min, ratio_max smallest and largest r
    clipped_above        share of samples with r above the clip range, whatever the sign of A
    clipped_below        share below it; both 0 for a method without a clip
    ==================== ==============================================================================

    A log-ratio counts up to 80 there, near which float32 ends; without a usable sample the ratio is 1.
    """

    values: Tensor
    names: tuple[str, ...]
    unbounded: str = ""  # what to say of nonconvex samples where that makes the loss unbounded below

    @property
    def joins(self) -> tuple[Join, ...]:
        """How each metric of several micro-batches, of equal names, becomes one of the batch."""
        return tuple(JOINS[name] for name in self.names)

    def as_dict(self) -> dict[str, float]:
        """All metrics as Python floats; waits for the device once, and gives the warnings the step could not."""
        numbers = self._numbers()
        self._warn(numbers, stacklevel=4)
        return numbers

    def warn_now(self, stacklevel: int) -> None:
        """The same warnings without waiting for somebody to ask; ``stacklevel`` as :func:`warnings.warn` counts it."""
        if self.unbounded and values_are_at_hand(self.values):
            self._warn(self._numbers(), stacklevel + 3)

    def _numbers(self) -> dict[str, float]:
        return dict(zip(self.names, self.values.tolist(), strict=True))

    def _warn(self, numbers: dict[str, float], stacklevel: int) -> None:
        if self.unbounded and numbers["nonconvex_samples"] > 0:
            warn_nonconvex(self.unbounded, int(numbers["nonconvex_samples"]), numbers["min_curvature"], stacklevel)


def forward_metrics(extra: tuple[str, ...] = (), ratio: bool = False) -> tuple[str, ...]:
    """The names in the order of their values, ``extra`` among the means."""
    return (
        "loss",
        "policy_term",
        *extra,
        "target_error",
        "rollout_deviation",
        "reference_deviation",
        "mean_advantage",
        "mean_abs_advantage",
        "min_curvature",
        "nonconvex_samples",
        "nonfinite_samples",
        "invalid_timesteps",
        "contrast_alive",
        *(RATIO_METRICS if ratio else ()),
    )


DISTILLATION_METRICS = ("loss", "teacher_deviation", "nonfinite_samples", "invalid_steps")

TRANSITION_METRICS = (
    "loss",
    "policy_term",
    "unweighted_policy",
    "mean_log_ratio",
    "mean_kl_old",
    "mean_kl_ref",
    "mean_advantage",
    "mean_abs_advantage",
    "max_abs_log_ratio",
    "masked_samples",
    "nonfinite_samples",
    "invalid_steps",
    "contrast_alive",
    *RATIO_METRICS,
)


TOKEN_METRICS = (
    "loss",
    "policy_term",
    "mean_entropy",
    "mean_log_ratio",
    "mean_kl_ref",
    "mean_advantage",
    "mean_abs_advantage",
    "max_abs_log_ratio",
    "clipped_fraction",
    "nonfinite_samples",
    "invalid_sequences",
    *RATIO_METRICS,
)


class Ratio(NamedTuple):
    """A ratio of two policies' probabilities, and where it is clipped; None: nowhere."""

    log_ratio: Tensor  # [B]
    log_lowest: Number | None = None
    log_highest: Number | None = None


class LossOutput(NamedTuple):
    """``loss``: a scalar, or ``[B]`` for reduction "none". ``metrics``: see :class:`LossMetrics`."""

    loss: Tensor
    metrics: LossMetrics


class SdeStep(NamedTuple):
    """One step of a sampler: see :func:`advflow_ext.sde_step`."""

    x_next: Tensor
    eps: Tensor
    log_prob: Tensor


_already_warned: set[str] = set()


def warn_nonconvex(message: str, count: int, lowest: float, stacklevel: int) -> None:
    if message in _already_warned:
        return
    _already_warned.add(message)
    warnings.warn(message.format(count=count, lowest=lowest), UserWarning, stacklevel=stacklevel)
