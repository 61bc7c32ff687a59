"""Flow-GRPO (arXiv 2505.05470): the clipped ratio of sampler steps."""

from __future__ import annotations

import advflow_ext as af
from advflow.algorithms.batch import ReverseBatch
from advflow.algorithms.trust_region import TrustRegionMethod
from advflow.settings.methods import FlowGRPOConfig


class FlowGRPO(TrustRegionMethod[FlowGRPOConfig]):
    loss_name = "flow_grpo_loss"

    def loss(self, batch: ReverseBatch) -> af.LossOutput:
        return af.flow_grpo_loss(
            *batch.arguments,
            clip=self._settings.clip,
            kl_convention=self._settings.kl_convention,
            v_ref=batch.v_ref,
            kl_weight=self._settings.kl_weight,
            time_weight=self._settings.time_weight,
        )
