"""Leave-one-out FID as a reward of a run: what each image does to the distribution of all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

import advflow_ext as af
from advflow.autoregressive.features import Extractor
from advflow.settings.tokens import LooFIDConfig


class DistributionReward:
    """Rewards images of one iteration after another. The moving moments of all of them are the state.

    Of several processes all call, each with its own images: moments are of those of all. Raises ValueError for a
    reference whose features were made in another way.
    """

    def __init__(self, config: LooFIDConfig, extractor: Extractor, reference: af.FeatureMoments) -> None:
        for name, own, other in (
            ("extractor", extractor.name, reference.extractor),
            ("preprocessing", extractor.preprocessing, reference.preprocessing),
        ):
            if own != other:
                raise ValueError(f"the reference's {name} is {other!r}; accepted is that of the images, {own!r}")
        self._extractor = extractor
        self._distance = af.LeaveOneOutFID(reference, beta=config.beta, covariance=config.covariance)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        return self._extractor(images)

    def __call__(self, features: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
        """The rewards [N] of an iteration's images, which count from now on, and what belongs into its log."""
        rewards = self._distance.reward(features)
        self._distance.update(features)
        return rewards, {"loo_fid": self._distance.fid().item()}

    def state_dict(self) -> Mapping[str, Any]:
        return self._distance.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._distance.load_state_dict(state)
