"""FlowAWR (arXiv 2606.30376): matching a target moved from the rollout policy's prediction by the advantage."""

from __future__ import annotations

import advflow_ext as af
from advflow.algorithms.batch import ForwardBatch, Needs
from advflow.settings.methods import FlowAWRConfig


class FlowAWR:
    def __init__(self, settings: FlowAWRConfig) -> None:
        self._settings = settings
        self.needs = Needs(old=True, reference=settings.kl_weight > 0)

    def loss(self, batch: ForwardBatch) -> af.LossOutput:
        assert batch.v_old is not None
        return af.flow_awr_loss(
            batch.v,
            batch.x0,
            batch.noise,
            batch.t,
            batch.advantages,
            v_old=batch.v_old,
            v_ref=batch.v_ref,
            kl_weight=self._settings.kl_weight * batch.reference_scale,
            weighting=self._settings.weighting,
        )
