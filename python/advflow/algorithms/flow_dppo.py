"""Flow-DPPO (arXiv 2606.11025): the ratio, masked where the policy has moved far and would move further."""

from __future__ import annotations

import advflow_ext as af
from advflow.algorithms.batch import ReverseBatch
from advflow.algorithms.trust_region import TrustRegionMethod
from advflow.settings.methods import FlowDPPOConfig


class FlowDPPO(TrustRegionMethod[FlowDPPOConfig]):
    loss_name = "flow_dppo_loss"

    def loss(self, batch: ReverseBatch) -> af.LossOutput:
        return af.flow_dppo_loss(
            *batch.arguments,
            threshold=self._settings.threshold,
            direction=self._settings.direction,
            mask=self._settings.mask,
            step_size=self._settings.step_size,
            v_ref=batch.v_ref,
            kl_weight=self._settings.kl_weight,
            time_weight=self._settings.time_weight,
        )
