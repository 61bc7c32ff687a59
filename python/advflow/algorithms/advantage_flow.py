"""AdvantageFlow (arXiv 2605.26013): advantage-weighted flow matching, anchored to the rollout policy."""

from __future__ import annotations

import advflow_ext as af
from advflow.algorithms.batch import ForwardBatch, Needs
from advflow.settings.config import TrainConfig


def needs(config: TrainConfig) -> Needs:
    return Needs(old=True, reference=config.advantage_flow.lam > 0)


def loss(batch: ForwardBatch, config: TrainConfig) -> af.LossOutput:
    assert batch.v_old is not None
    choice = config.advantage_flow
    return af.advantage_flow_loss(
        batch.v,
        batch.x0,
        batch.noise,
        batch.t,
        batch.advantages + choice.offset,
        v_old=batch.v_old,
        v_ref=batch.v_ref,
        gamma=choice.gamma,
        lam=choice.lam * batch.reference_scale,
        weighting=choice.weighting,
        beta=choice.beta,
    )
