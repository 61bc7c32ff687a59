"""Flow-CPS (arXiv 2509.05952): the clipped ratio without its variance, as released."""

from __future__ import annotations

import advflow_ext as af
from advflow.algorithms.batch import Needs, TransitionBatch
from advflow.settings.config import TrainConfig
from advflow.settings.methods import FlowCPSConfig
from advflow_ext.losses import LOSSES

LOSS = LOSSES["flow_cps_loss"]


def settings(config: TrainConfig) -> FlowCPSConfig:
    return config.flow_cps


def needs(config: TrainConfig) -> Needs:
    return Needs(old=True, reference=settings(config).kl_weight > 0)


def loss(batch: TransitionBatch, config: TrainConfig) -> af.LossOutput:
    choice = settings(config)
    return af.flow_cps_loss(
        batch.v,
        batch.v_old,
        batch.eps,
        batch.table,
        batch.index,
        batch.advantages,
        clip=choice.clip,
        v_ref=batch.v_ref,
        kl_weight=choice.kl_weight,
    )
