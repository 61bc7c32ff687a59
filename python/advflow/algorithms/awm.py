"""Advantage-weighted matching (arXiv 2509.25050), on-policy; the rollout policy's weights are its EMA anchor."""

from __future__ import annotations

import advflow_ext as af
from advflow.algorithms.batch import ForwardBatch, Needs
from advflow.settings.config import TrainConfig


def needs(config: TrainConfig) -> Needs:
    return Needs(old=config.awm.ema_weight > 0, reference=config.awm.kl_weight > 0)


def loss(batch: ForwardBatch, config: TrainConfig) -> af.LossOutput:
    choice = config.awm
    return af.awm_loss(
        batch.v,
        batch.x0,
        batch.noise,
        batch.t,
        batch.advantages,
        v_ema=batch.v_old,
        v_ref=batch.v_ref,
        weighting=choice.weighting,
        power=choice.power,
        ema_weight=choice.ema_weight,
        kl_weight=choice.kl_weight * batch.reference_scale,
    )
