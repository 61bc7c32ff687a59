"""Reward-weighted flow matching: ORW-CFM-W2, RWR and RAFT."""

from __future__ import annotations

import advflow_ext as af
from advflow.algorithms.batch import ForwardBatch, Needs
from advflow.settings.methods import RewardWeightedConfig


class RewardWeighted:
    def __init__(self, settings: RewardWeightedConfig) -> None:
        self._settings = settings
        self.needs = Needs(old=False, reference=settings.kl_weight > 0)

    def loss(self, batch: ForwardBatch) -> af.LossOutput:
        return af.reward_weighted_loss(
            batch.v,
            batch.x0,
            batch.noise,
            batch.t,
            batch.rewards if self._settings.of == "rewards" else batch.advantages,
            method=self._settings.method,
            tau=self._settings.tau,
            group_size=batch.group_size if self._settings.method == "best" else None,
            v_ref=batch.v_ref,
            kl_weight=self._settings.kl_weight * batch.reference_scale,
        )
