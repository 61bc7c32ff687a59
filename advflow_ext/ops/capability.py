"""AdaGRPO (arXiv 2606.06828): which prompts suit what a model can do by now, and advantages that know it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

from advflow_ext.contract.checks import require_flag
from advflow_ext.contract.numbers import Number, Numbers, require_number, values_are_at_hand
from advflow_ext.contract.ranks import exchange_device
from advflow_ext.ops.advantages import HEADROOM, check_rewards, clamped, group_advantages, groups_of

# All as released.
_EPS = 1e-8
_LEAST_VARIANCE = 1e-8
_LEAST_SIDE = 1e-6


class CrossLevelAdvantages(NamedTuple):
    """What :func:`cross_level_advantages` returns: ``local`` + weight * ``calibrated``, and both parts, ``[L*K]``.

    ``two_sided`` ``[L]``: whether a group has images on both sides of the mean that it was held against. Elsewhere
    ``calibrated`` only rescales what ``local`` says already.
    """

    advantages: Tensor
    local: Tensor
    calibrated: Tensor
    two_sided: Tensor


@torch.no_grad()
def cross_level_advantages(
    rewards: Tensor,
    group_size: int,
    *,
    mean: Number,
    variance: Number,
    weight: Number = 1.0,
    clip: Number | None = 5.0,
) -> CrossLevelAdvantages:
    """AdaGRPO's advantages of rewards ``[L*K]``: L prompts with K = ``group_size`` images each, images of a prompt
    consecutive, as coded in Bujiazi/GRPO-Series @d0ddaa4::

        local      = clip((R - mean_k R) / (std_k R + 1e-8), +-clip)             std with K - 1
        z          = (R - mean) / (sqrt(max(variance, 1e-8)) + 1e-8)
        calibrated = clip(z / sum_k z+ where z > 0, z / sum_k z- where z < 0, +-clip)   both sums at least 1e-6
                   = clip(z - mean_k z, +-clip)                                          otherwise
        advantages = local + weight * calibrated

    ``mean`` and ``variance`` say what the model can do by now: those of a :class:`CapabilityTracker`, of the same
    reward. They are numbers or 0-dim tensors, as are ``weight`` and ``clip`` (``None``: no clip).

    Both parts of a group sum to 0, but for what the clip cuts off: the group's level moves weight from one image to
    another, never all of them together. In a two-sided group ``calibrated`` has a mean magnitude of 2/K, whatever the
    deviations; in another it is ``local`` times (std_k R + 1e-8) / (sqrt(variance) + 1e-8).

    An image whose reward is not finite gets 0 and counts in no mean, sum or deviation; equal rewards give zeros. A
    mean, variance or weight that is not finite, and a negative variance or weight, is refused; on a GPU, where nobody
    waits for it, it leaves ``calibrated`` 0, no group two-sided and ``advantages`` the ``local`` ones. Any real dtype
    is accepted; the arithmetic is float64; the result is float64 for float64 rewards, else float32.

    Raises ValueError for rewards that are not ``[L*K]``, group_size below 2, and numbers out of range.
    """
    check_rewards(rewards, group_size)
    numbers = Numbers(rewards, torch.float64, per_sample=False)
    mean = numbers.read("mean", mean)
    variance = numbers.read("variance", variance, low=0.0)
    weight = numbers.read("weight", weight, low=0.0)
    if clip is not None:
        clip = numbers.read("clip", clip, low=0.0, exclusive=True)

    local = group_advantages(rewards.detach().double(), group_size, norm="group_std", clip=clip, eps=_EPS, ddof=1)
    raw, centred, finite = groups_of(rewards, group_size)
    sigma = (torch.as_tensor(variance, dtype=raw.dtype).clamp(min=_LEAST_VARIANCE).sqrt() + _EPS) * HEADROOM
    distance = torch.where(finite, raw - mean * HEADROOM, 0)  # z sigma
    above, below = distance.clamp(min=0).sum(1, keepdim=True), -distance.clamp(max=0).sum(1, keepdim=True)
    two_sided = (above >= _LEAST_SIDE * sigma) & (below >= _LEAST_SIDE * sigma)
    share = torch.where(distance > 0, distance / above, torch.where(distance < 0, distance / below, 0))
    calibrated = numbers.contain(torch.where(two_sided, share, centred / sigma))
    if clip is not None:
        calibrated = clamped(calibrated, clip)
    two_sided = two_sided & ~calibrated.isnan().any(1, keepdim=True)
    calibrated = torch.where(calibrated.isnan(), 0, calibrated).flatten()

    dtype = torch.float64 if rewards.dtype == torch.float64 else torch.float32
    # A weight without a meaning has left nothing to weigh, and may itself be NaN.
    fused = local + torch.where(calibrated == 0, 0, weight * calibrated)
    return CrossLevelAdvantages(fused.to(dtype), local.to(dtype), calibrated.to(dtype), two_sided.flatten())


class CapabilityTracker:
    """What a model can do by now, as moving averages of the mean and the variance of one reward, and which prompts are
    nearest to it: AdaGRPO's curriculum. Each step, draw one deterministic image for each of many candidate prompts::

        tracker.observe(scores)                # of the candidates, one number each
        kept = tracker.pick(scores, k)         # the prompts to draw groups for
        out = cross_level_advantages(rewards, K, mean=tracker.mean, variance=tracker.variance)

    The first scores give mean and variance themselves, later ones x <- decay x + (1 - decay) x_now, with the variance
    inside each batch (of N, not N - 1), as in Bujiazi/GRPO-Series @d0ddaa4.

    Where torch.distributed is initialised, the mean and variance observed are those of all ranks' scores, so that every
    rank has the same state and picks from its own candidates by it. All ranks of ``process_group`` (``None``: all there
    are) then observe together, each with as many scores as it has; a rank whose scores are refused leaves the others
    waiting. ``per_rank=True`` is what the authors' code does: a state on each rank, of its own scores alone.

    Scores that are not finite count in no mean and are picked last; scores whose mean or variance is beyond float64
    move nothing. Nothing waits for a GPU: the state lies on the device of the scores, in float64.

    Raises ValueError for a decay outside [0, 1), for both of a process group and per_rank, and in use on a rank outside
    the group.
    """

    def __init__(
        self, decay: float = 0.8, process_group: distributed.ProcessGroup | None = None, *, per_rank: bool = False
    ) -> None:
        require_number("decay", decay, low=0.0, high=1.0)
        require_flag("per_rank", per_rank)
        if per_rank and process_group is not None:
            raise ValueError("per_rank is True with a process_group; accepted is one of the two.")
        self._decay, self._group, self._per_rank = float(decay), process_group, per_rank
        self._mean = self._variance = torch.tensor(torch.nan, dtype=torch.float64)

    @property
    def mean(self) -> Tensor:
        """Moving average of the mean score, float64 []; NaN before there was a finite score."""
        return self._mean

    @property
    def variance(self) -> Tensor:
        """Moving average of the scores' variance, float64 []; NaN before there was a finite score."""
        return self._variance

    @torch.no_grad()
    def observe(self, scores: Tensor) -> None:
        """Takes the scores ``[N]`` of a step's candidates into account.

        Raises ValueError for scores that are not ``[N]`` real numbers.
        """
        _check_scores(scores)
        count, mean, squares = self._gathered(_moments(scores.detach().double()))
        # Of parts: the squares inside each and those of the parts' means.
        total = count.sum()
        now = (count * mean).sum() / total  # NaN where nothing is finite
        spread = (squares.sum() + (count * (mean - now).square()).sum()) / total
        usable = now.isfinite() & spread.isfinite()
        self._mean, self._variance = (
            self._moved(old, torch.where(usable, new, torch.nan))
            for old, new in ((self._mean, now), (self._variance, spread))
        )

    @torch.no_grad()
    def pick(self, scores: Tensor, k: int) -> Tensor:
        """Indices ``[k]`` of the scores nearest to the mean, nearest first; of equally near ones the first.

        Raises ValueError for scores that are not ``[N]`` real numbers, a k outside 1 .. N, and where nothing has been
        observed.
        """
        _check_scores(scores)
        if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= len(scores):
            raise ValueError(f"k is {k!r}; accepted is an integer from 1 to the number of scores, {len(scores)}.")
        if values_are_at_hand(self._mean) and self._mean.isnan():
            raise ValueError("pick() has no mean to be near to; accepted is an observe() of finite scores before it.")
        distance = (scores.detach().double() - self._mean.to(scores.device)).abs()
        return torch.where(distance.isnan(), torch.inf, distance).argsort(stable=True)[:k]

    def state_dict(self) -> dict[str, Tensor]:
        return {"mean": self._mean, "variance": self._variance}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what :meth:`state_dict` returned, bit for bit.

        Raises ValueError for another's state: other names or shapes, an infinite number, a negative variance, and one
        NaN without the other.
        """
        if state.keys() != self.state_dict().keys():
            raise ValueError(f"state holds {sorted(state)}; accepted are 'mean' and 'variance'.")
        for name, value in state.items():
            if not isinstance(value, float) and (not isinstance(value, Tensor) or value.dim()):
                raise ValueError(f"state[{name!r}] is {value!r}; accepted is a number or a tensor of shape [].")
        mean, variance = (torch.as_tensor(state[name], dtype=torch.float64).clone() for name in ("mean", "variance"))
        fresh = mean.isnan() and variance.isnan()
        if not fresh and not (mean.isfinite() and variance.isfinite() and variance >= 0):
            raise ValueError(
                f"state holds a mean of {mean.item():g} and a variance of {variance.item():g}; accepted are finite "
                "ones, the variance at least 0, or NaN in both before the first scores."
            )
        self._mean, self._variance = mean, variance

    def _moved(self, old: Tensor, now: Tensor) -> Tensor:
        old = old.to(now.device, non_blocking=True)
        moved = torch.where(old.isnan(), now, self._decay * old + (1 - self._decay) * now)
        return torch.where(now.isnan(), old, moved)

    def _gathered(self, moments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of every rank that takes part, each ``[ranks]``."""
        parts = [moments]
        if not self._per_rank and distributed.is_available() and distributed.is_initialized():
            near = moments.to(exchange_device(self._group, moments.device))
            parts = [torch.empty_like(near) for _ in range(distributed.get_world_size(self._group))]
            distributed.all_gather(parts, near, group=self._group)
        count, mean, squares = torch.stack(parts).to(moments.device).unbind(1)
        return count, mean, squares


def _moments(scores: Tensor) -> Tensor:
    """How many of the scores are finite, their mean and the sum of their squares from it; zeros where none is."""
    finite = scores.isfinite()
    count = finite.sum()
    # From one of them, as in group_advantages: equal scores have a variance of 0.
    origin = torch.where(finite, scores, torch.inf).amin() if scores.numel() else scores.sum()
    origin = torch.where(count > 0, origin, 0)
    shifted = torch.where(finite, scores - origin, 0)
    mean = shifted.sum() / count.clamp(min=1)
    squares = torch.where(finite, shifted - mean, 0).square().sum()
    return torch.stack([count.to(scores.dtype), origin + mean, squares])


def _check_scores(scores: object) -> None:
    if not isinstance(scores, Tensor) or scores.is_complex() or scores.dim() != 1:
        given = f"a tensor {scores.dtype} {list(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(f"scores is {given}; accepted is a real torch.Tensor of shape [N].")
