"""AdaGRPO: the prompts that suit what the model can do by now, and advantages held against it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch

import advflow_ext as af
from advflow.settings.capability import CapabilityConfig
from advflow.settings.data import AdvantageConfig

_LEAST_VARIANCE = 1e-8  # where `cross_level_advantages` holds it: scores that are all the same have no deviation


class Curriculum:
    """Chooses an iteration's prompts by the scores of one image each, then fuses what those say into its advantages.

    `choose` and `fuse` come in turn. What `choose` has seen counts once `fuse` has been called: a rollout that is
    interrupted in between starts again from the same state. `mean` and `variance` are all the state there is.
    """

    def __init__(self, config: CapabilityConfig, kept: int, group_size: int, advantage: AdvantageConfig) -> None:
        self._config, self._kept, self._group, self._advantage = config, kept, group_size, advantage
        # Scores of all processes are gathered before they come here.
        self._tracker = self._next = af.CapabilityTracker(config.decay, per_rank=True)
        self._row: dict[str, float] = {}

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self._tracker.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._tracker.load_state_dict(state)

    def choose(self, scores: torch.Tensor) -> list[int]:
        """The places of the prompts to learn from, in order, among candidates with these `scores`."""
        self._next = copy.copy(self._tracker)
        self._next.observe(scores)
        mean, std = self._next.mean, self._next.variance.sqrt()
        kept = _nearest(self._config.select, scores.double(), mean, self._kept)
        finite = scores.isfinite()
        self._row = {
            "candidate_reward": scores[finite].mean().item(),
            "unscored_candidates": int((~finite).sum()),
            "capability_mean": mean.item(),
            "capability_std": std.item(),
            "kept_distance": ((scores[kept].double() - mean).abs() / std.clamp(min=1e-4)).nanmean().item(),
        }
        return kept

    def fuse(self, rewards: torch.Tensor, advantages: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
        """The groups' own `advantages` and those held against the model's capability; what belongs into the log."""
        self._tracker = self._next
        mean, variance = self._tracker.mean, self._tracker.variance
        if mean.isnan():  # no candidate has been scored yet
            return advantages, self._row
        # The op's clip would cut off what makes a group sum to 0; the bound of the sum does without.
        out = af.cross_level_advantages(rewards.double(), self._group, mean=mean, variance=variance, clip=None)
        unit, bound = self._unit_and_bound
        weight = self._config.weight * unit if variance > _LEAST_VARIANCE else 0.0
        groups = (advantages.double() + weight * out.calibrated).view(-1, self._group)
        groups = groups * (bound / groups.abs().amax(1, keepdim=True)).clamp(max=1.0)
        fused = groups.flatten().to(advantages.dtype)
        told = rewards.isfinite()
        flips = (advantages * fused < 0)[told].float().mean().item()
        return fused, self._row | {"two_sided_groups": out.two_sided.float().mean().item(), "sign_flips": flips}

    @property
    def _unit_and_bound(self) -> tuple[float, float]:
        """Those of the groups' own advantages: what one of one deviation is called, and how large one may be.

        The authors' code has no bound for the sum, which does not reach 5 there.
        """
        choice = self._advantage
        if choice.norm == "softmax":  # which has no other `clip_mode`; `clip` bounds what comes before it
            return 1.0, 3.0
        return (1 / choice.clip, 1.0) if choice.clip_mode == "clip_divide" else (1.0, choice.clip)


def _nearest(select: str, scores: torch.Tensor, mean: torch.Tensor, count: int) -> list[int]:
    """The places of `count` scores, in order; those that are not finite last."""
    finite = scores.isfinite()
    if select == "random" or not finite.any():
        return list(range(count))
    aim = {
        "ema": mean,
        "medium": scores[finite].median(),
        "easiest": scores[finite].max(),
        "hardest": scores[finite].min(),
    }
    distance = (scores - aim[select]).abs()
    return distance.masked_fill(~finite, torch.inf).argsort(stable=True)[:count].sort().values.tolist()
