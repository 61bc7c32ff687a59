"""Flow-DPPO (arXiv 2606.11025): the ratio, masked where the policy has moved far and would move further."""

from __future__ import annotations

import advflow_ext as af
from advflow.algorithms.batch import Needs, TransitionBatch
from advflow.settings.config import TrainConfig
from advflow.settings.methods import FlowDPPOConfig
from advflow_ext.losses import LOSSES

LOSS = LOSSES["flow_dppo_loss"]


def settings(config: TrainConfig) -> FlowDPPOConfig:
    return config.flow_dppo


def needs(config: TrainConfig) -> Needs:
    return Needs(old=True, reference=settings(config).kl_weight > 0)


def loss(batch: TransitionBatch, config: TrainConfig) -> af.LossOutput:
    choice = settings(config)
    return af.flow_dppo_loss(
        batch.v,
        batch.v_old,
        batch.eps,
        batch.table,
        batch.index,
        batch.advantages,
        threshold=choice.threshold,
        direction=choice.direction,
        mask=choice.mask,
        step_size=choice.step_size,
        v_ref=batch.v_ref,
        kl_weight=choice.kl_weight,
    )
