"""Flow-CPS (arXiv 2509.05952): the clipped ratio without its variance, as released."""

from __future__ import annotations

import advflow_ext as af
from advflow.algorithms.batch import Needs, ReverseBatch
from advflow.algorithms.trust_region import bound_of
from advflow.settings.methods import FlowCPSConfig


class FlowCPS:
    def __init__(self, settings: FlowCPSConfig) -> None:
        self._settings = settings
        self.bound = bound_of("flow_cps_loss", settings)
        self.needs = Needs(old=True, reference=settings.kl_weight > 0)

    def loss(self, batch: ReverseBatch) -> af.LossOutput:
        return af.flow_cps_loss(
            batch.v,
            batch.v_old,
            batch.eps,
            batch.table,
            batch.index,
            batch.advantages,
            clip=self._settings.clip,
            v_ref=batch.v_ref,
            kl_weight=self._settings.kl_weight,
        )
