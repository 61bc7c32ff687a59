"""GRPO-Guard (arXiv 2510.22319): the clipped, normalised ratio."""

from __future__ import annotations

import advflow_ext as af
from advflow.algorithms.batch import Needs, TransitionBatch
from advflow.settings.config import TrainConfig
from advflow.settings.methods import GRPOGuardConfig
from advflow_ext.losses import LOSSES

LOSS = LOSSES["grpo_guard_loss"]


def settings(config: TrainConfig) -> GRPOGuardConfig:
    return config.grpo_guard


def needs(config: TrainConfig) -> Needs:
    return Needs(old=True, reference=settings(config).kl_weight > 0)


def loss(batch: TransitionBatch, config: TrainConfig) -> af.LossOutput:
    choice = settings(config)
    return af.grpo_guard_loss(
        batch.v,
        batch.v_old,
        batch.eps,
        batch.table,
        batch.index,
        batch.advantages,
        clip=choice.clip,
        time_weight=choice.time_weight,
        v_ref=batch.v_ref,
        kl_weight=choice.kl_weight,
    )
