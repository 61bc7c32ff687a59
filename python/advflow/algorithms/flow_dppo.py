"""Flow-DPPO (arXiv 2606.11025): the ratio, masked where the policy has moved far and would move further."""

from __future__ import annotations

import advflow_ext as af
from advflow.algorithms.batch import Needs, ReverseBatch
from advflow.algorithms.trust_region import bound_of
from advflow.settings.methods import FlowDPPOConfig


class FlowDPPO:
    def __init__(self, settings: FlowDPPOConfig) -> None:
        self._settings = settings
        self.bound = bound_of("flow_dppo_loss", settings)
        self.needs = Needs(old=True, reference=settings.kl_weight > 0)

    def loss(self, batch: ReverseBatch) -> af.LossOutput:
        return af.flow_dppo_loss(
            batch.v,
            batch.v_old,
            batch.eps,
            batch.table,
            batch.index,
            batch.advantages,
            threshold=self._settings.threshold,
            direction=self._settings.direction,
            mask=self._settings.mask,
            step_size=self._settings.step_size,
            v_ref=batch.v_ref,
            kl_weight=self._settings.kl_weight,
        )
