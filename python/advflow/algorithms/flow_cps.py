"""Flow-CPS (arXiv 2509.05952): the clipped ratio without its variance, as released."""

from __future__ import annotations

import advflow_ext as af
from advflow.algorithms.batch import ReverseBatch
from advflow.algorithms.trust_region import TrustRegionMethod
from advflow.settings.methods import FlowCPSConfig


class FlowCPS(TrustRegionMethod[FlowCPSConfig]):
    loss_name = "flow_cps_loss"

    def loss(self, batch: ReverseBatch) -> af.LossOutput:
        return af.flow_cps_loss(
            *batch.arguments,
            clip=self._settings.clip,
            v_ref=batch.v_ref,
            kl_weight=self._settings.kl_weight,
            time_weight=self._settings.time_weight,
        )
