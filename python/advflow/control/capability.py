"""AdaGRPO: the prompts that suit what the model can do by now, and advantages held against it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch

import advflow_ext as af
from advflow.settings.capability import CapabilityConfig
from advflow.settings.data import AdvantageConfig


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
        out = af.cross_level_advantages(rewards, self._group, mean=mean, variance=variance)
        fused = advantages + self._config.weight * self._unit * out.calibrated.to(advantages.dtype)
        if self._bound is not None:
            fused = fused.clamp(-self._bound, self._bound)
        told = rewards.isfinite()
        flips = (advantages * fused < 0)[told].float().mean().item()
        return fused, self._row | {"two_sided_groups": out.two_sided.float().mean().item(), "sign_flips": flips}

    @property
    def _unit(self) -> float:
        """What an advantage of one deviation is called: calibrated ones have that unit too."""
        return 1 / self._advantage.clip if self._advantage.clip_mode == "clip_divide" else 1.0

    @property
    def _bound(self) -> float | None:
        """That of the groups' own advantages. The authors' code has none for the sum, which does not reach 5 there."""
        if self._advantage.norm == "softmax":
            return None
        return self._advantage.clip * self._unit


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
