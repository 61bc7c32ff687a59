"""What a method of the reverse process bounds, as the metric that shows it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from advflow_ext.losses import LOSSES


@dataclass(frozen=True)
class Bound:
    """The loss acts on sampler steps whose `metric` reaches `limit`; a bound `of_ratio` is compared with its log."""

    metric: str
    option: float
    of_ratio: bool

    @property
    def limit(self) -> float:
        return math.log1p(self.option) if self.of_ratio else self.option


def bound_of(loss: str, settings: object) -> Bound:
    """That of `advflow_ext`'s loss of this name; `settings` hold the option of its trust region."""
    region = LOSSES[loss].trust_region
    assert region is not None, f"{loss} has no trust region"
    return Bound(region.metric, float(getattr(settings, region.option)), region.of_ratio)
