"""Reward-weighted flow matching: ORW-CFM-W2, RWR and RAFT."""

from __future__ import annotations

import advflow_ext as af
from advflow.algorithms.batch import ForwardBatch, Needs
from advflow.settings.config import TrainConfig


def needs(config: TrainConfig) -> Needs:
    return Needs(old=False, reference=config.reward_weighted.kl_weight > 0)


def loss(batch: ForwardBatch, config: TrainConfig) -> af.LossOutput:
    choice = config.reward_weighted
    return af.reward_weighted_loss(
        batch.v,
        batch.x0,
        batch.noise,
        batch.t,
        batch.rewards,
        method=choice.method,
        tau=choice.tau,
        group_size=config.rollout.images_per_prompt if choice.method == "best" else None,
        v_ref=batch.v_ref,
        kl_weight=choice.kl_weight * batch.reference_scale,
    )
