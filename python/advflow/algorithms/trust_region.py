"""Methods of the reverse process, and what they bound, as the metric that shows it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Generic, Protocol, TypeVar

from advflow.algorithms.batch import Needs
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


class WithReference(Protocol):
    kl_weight: float


S = TypeVar("S", bound=WithReference)


class TrustRegionMethod(Generic[S]):
    """What methods of the reverse process share: the bound of their loss, and which velocities they need."""

    loss_name: ClassVar[str]

    def __init__(self, settings: S) -> None:
        self._settings = settings
        self.bound = bound_of(self.loss_name, settings)
        self.needs = Needs(old=True, reference=settings.kl_weight > 0)
