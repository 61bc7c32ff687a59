"""Flow-GRPO (arXiv 2505.05470): the clipped ratio of sampler steps."""

from __future__ import annotations

import advflow_ext as af
from advflow.algorithms.batch import Needs, TransitionBatch
from advflow.settings.config import TrainConfig
from advflow.settings.methods import FlowGRPOConfig
from advflow_ext.losses import LOSSES

LOSS = LOSSES["flow_grpo_loss"]


def settings(config: TrainConfig) -> FlowGRPOConfig:
    return config.flow_grpo


def needs(config: TrainConfig) -> Needs:
    return Needs(old=True, reference=settings(config).kl_weight > 0)


def loss(batch: TransitionBatch, config: TrainConfig) -> af.LossOutput:
    choice = settings(config)
    return af.flow_grpo_loss(
        batch.v,
        batch.v_old,
        batch.eps,
        batch.table,
        batch.index,
        batch.advantages,
        clip=choice.clip,
        kl_convention=choice.kl_convention,
        v_ref=batch.v_ref,
        kl_weight=choice.kl_weight,
    )
