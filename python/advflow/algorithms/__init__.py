"""Policy-improvement methods: one small file each, which turns a batch into a loss.

A method of the forward process learns from (t, noise) pairs put on the rollout's images, one of the reverse process
from the sampler steps that made them. Every module has

* ``loss(batch, config)``, with a :class:`~advflow.batch.ForwardBatch` or a :class:`~advflow.batch.TransitionBatch`;
* ``needs(config)``: which frozen policies' velocities the batch has to hold beside the learner's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from advflow.algorithms import (
    advantage_flow,
    awm,
    diffusion_nft,
    flow_awr,
    flow_cps,
    flow_dppo,
    flow_grpo,
    grpo_guard,
    reward_weighted,
)

if TYPE_CHECKING:
    import advflow_ext as af
    from advflow.batch import ForwardBatch, Needs, TransitionBatch
    from advflow.config import TrainConfig
    from advflow_ext.losses import Loss


class ForwardAlgorithm(Protocol):
    def needs(self, config: TrainConfig) -> Needs: ...

    def loss(self, batch: ForwardBatch, config: TrainConfig) -> af.LossOutput: ...


class ReverseAlgorithm(Protocol):
    LOSS: Loss

    def settings(self, config: TrainConfig) -> object:
        """Its section, which holds the option of the loss's trust region."""

    def needs(self, config: TrainConfig) -> Needs: ...

    def loss(self, batch: TransitionBatch, config: TrainConfig) -> af.LossOutput: ...


FORWARD: dict[str, ForwardAlgorithm] = {
    "advantage_flow": advantage_flow,
    "diffusion_nft": diffusion_nft,
    "awm": awm,
    "flow_awr": flow_awr,
    "reward_weighted": reward_weighted,
}

# DanceGRPO and MixGRPO are Flow-GRPO's loss on another sampler and another window of steps.
REVERSE: dict[str, ReverseAlgorithm] = {
    "flow_grpo": flow_grpo,
    "dance_grpo": flow_grpo,
    "mix_grpo": flow_grpo,
    "flow_cps": flow_cps,
    "grpo_guard": grpo_guard,
    "flow_dppo": flow_dppo,
}
