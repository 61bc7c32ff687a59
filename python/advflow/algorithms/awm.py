"""Advantage-weighted matching (arXiv 2509.25050), on-policy; the rollout policy's weights are its EMA anchor."""

from __future__ import annotations

import advflow_ext as af
from advflow.algorithms.batch import ForwardBatch, Needs
from advflow.settings.methods import AWMConfig


class AWM:
    def __init__(self, settings: AWMConfig) -> None:
        self._settings = settings
        self.needs = Needs(old=settings.ema_weight > 0, reference=settings.kl_weight > 0)

    def loss(self, batch: ForwardBatch) -> af.LossOutput:
        return af.awm_loss(
            batch.v,
            batch.x0,
            batch.noise,
            batch.t,
            batch.advantages,
            v_ema=batch.v_old,
            v_ref=batch.v_ref,
            weighting=self._settings.weighting,
            power=self._settings.power,
            ema_weight=self._settings.ema_weight,
            kl_weight=self._settings.kl_weight * batch.reference_scale,
        )
