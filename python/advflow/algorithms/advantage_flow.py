"""AdvantageFlow (arXiv 2605.26013): advantage-weighted flow matching, anchored to the rollout policy."""

from __future__ import annotations

import advflow_ext as af
from advflow.algorithms.batch import ForwardBatch, Needs
from advflow.settings.methods import AdvantageFlowConfig


class AdvantageFlow:
    def __init__(self, settings: AdvantageFlowConfig) -> None:
        self._settings = settings
        self.needs = Needs(old=True, reference=settings.lam > 0)

    def loss(self, batch: ForwardBatch) -> af.LossOutput:
        assert batch.v_old is not None
        return af.advantage_flow_loss(
            batch.v,
            batch.x0,
            batch.noise,
            batch.t,
            batch.advantages + self._settings.offset,
            v_old=batch.v_old,
            v_ref=batch.v_ref,
            gamma=self._settings.gamma,
            lam=self._settings.lam * batch.reference_scale,
            weighting=self._settings.weighting,
            beta=self._settings.beta,
        )
