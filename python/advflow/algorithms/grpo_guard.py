"""GRPO-Guard (arXiv 2510.22319): the clipped, normalised ratio."""

from __future__ import annotations

import advflow_ext as af
from advflow.algorithms.batch import Needs, ReverseBatch
from advflow.algorithms.trust_region import bound_of
from advflow.settings.methods import GRPOGuardConfig


class GRPOGuard:
    def __init__(self, settings: GRPOGuardConfig) -> None:
        self._settings = settings
        self.bound = bound_of("grpo_guard_loss", settings)
        self.needs = Needs(old=True, reference=settings.kl_weight > 0)

    def loss(self, batch: ReverseBatch) -> af.LossOutput:
        return af.grpo_guard_loss(
            batch.v,
            batch.v_old,
            batch.eps,
            batch.table,
            batch.index,
            batch.advantages,
            clip=self._settings.clip,
            time_weight=self._settings.time_weight,
            v_ref=batch.v_ref,
            kl_weight=self._settings.kl_weight,
        )
