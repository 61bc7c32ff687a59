"""AdaGRPO around any algorithm: which prompts are learnt from, and what rewards are held against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from advflow.settings.numbers import require


@dataclass
class CapabilityConfig:
    """AdaGRPO (arXiv 2606.06828) around any algorithm; see `advflow_ext.CapabilityTracker`.

    An iteration draws one deterministic image for each of many candidate prompts, which count as images drawn, and
    learns from those whose score is nearest to what the model can do by now, a moving average. Advantages of the groups
    are then also held against that.

    Args:
        candidates: prompts an iteration that get one image, of which rollout.prompts are kept (10 and 1 in the authors'
            code); null: no curriculum, and advantages of the groups alone.
        select: which are kept: the nearest to the moving average ("ema"), to the median of this iteration's scores
            ("medium"), those with the highest ("easiest") or lowest score ("hardest"), or the first ones ("random").
        decay: of the moving average, on the old value.
        weight: of the advantages held against the moving average; 0: those of the groups alone. With
            reward_weighted.of "rewards" none of either is learnt from.
    """

    candidates: int | None = None
    select: Literal["ema", "medium", "easiest", "hardest", "random"] = "ema"
    decay: float = 0.8
    weight: float = 1.0

    def __post_init__(self) -> None:
        number = self.candidates
        require(number is None or number >= 1, "capability.candidates", number, "rollout.prompts or more, or null")
        require(0 <= self.decay < 1, "capability.decay", self.decay, "a number in [0, 1)")
        require(self.weight >= 0, "capability.weight", self.weight, "zero or a positive number")
