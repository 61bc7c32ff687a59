"""GRPO-Guard (arXiv 2510.22319): the clipped, normalised ratio."""

from __future__ import annotations

import advflow_ext as af
from advflow.algorithms.batch import ReverseBatch
from advflow.algorithms.trust_region import TrustRegionMethod
from advflow.settings.methods import GRPOGuardConfig


class GRPOGuard(TrustRegionMethod[GRPOGuardConfig]):
    loss_name = "grpo_guard_loss"

    def loss(self, batch: ReverseBatch) -> af.LossOutput:
        return af.grpo_guard_loss(
            *batch.arguments,
            clip=self._settings.clip,
            time_weight=self._settings.time_weight,
            v_ref=batch.v_ref,
            kl_weight=self._settings.kl_weight,
        )
