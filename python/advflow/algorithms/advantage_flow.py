"""AdvantageFlow (arXiv 2605.26013): advantage-weighted flow matching, anchored to the rollout policy."""

from __future__ import annotations

import advflow_ext as af
from advflow.config import LossConfig
from advflow.forward_process import ForwardBatch


def loss(batch: ForwardBatch, config: LossConfig) -> af.LossOutput:
    return af.advantage_flow_loss(
        batch.v,
        batch.x0,
        batch.noise,
        batch.t,
        batch.advantages,
        v_old=batch.v_old,
        v_ref=batch.v_ref,
        gamma=config.gamma,
        lam=config.lam,
        weighting=config.weighting,
    )
