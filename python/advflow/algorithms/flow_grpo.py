"""Flow-GRPO (arXiv 2505.05470): the clipped ratio of sampler steps."""

from __future__ import annotations

import advflow_ext as af
from advflow.algorithms.batch import Needs, ReverseBatch
from advflow.algorithms.trust_region import bound_of
from advflow.settings.methods import FlowGRPOConfig


class FlowGRPO:
    def __init__(self, settings: FlowGRPOConfig) -> None:
        self._settings = settings
        self.bound = bound_of("flow_grpo_loss", settings)
        self.needs = Needs(old=True, reference=settings.kl_weight > 0)

    def loss(self, batch: ReverseBatch) -> af.LossOutput:
        return af.flow_grpo_loss(
            batch.v,
            batch.v_old,
            batch.eps,
            batch.table,
            batch.index,
            batch.advantages,
            clip=self._settings.clip,
            kl_convention=self._settings.kl_convention,
            v_ref=batch.v_ref,
            kl_weight=self._settings.kl_weight,
        )
