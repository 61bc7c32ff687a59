"""FlowAWR (arXiv 2606.30376): matching a target moved from the rollout policy's prediction by the advantage."""

from __future__ import annotations

import advflow_ext as af
from advflow.algorithms.batch import ForwardBatch, Needs
from advflow.settings.config import TrainConfig


def needs(config: TrainConfig) -> Needs:
    return Needs(old=True, reference=config.flow_awr.kl_weight > 0)


def loss(batch: ForwardBatch, config: TrainConfig) -> af.LossOutput:
    assert batch.v_old is not None
    return af.flow_awr_loss(
        batch.v,
        batch.x0,
        batch.noise,
        batch.t,
        batch.advantages,
        v_old=batch.v_old,
        v_ref=batch.v_ref,
        kl_weight=config.flow_awr.kl_weight * batch.reference_scale,
        weighting=config.flow_awr.weighting,
    )
