"""Policy-improvement methods: one small file each, which turns a batch into a loss.

A method of the forward process learns from (t, noise) pairs put on the rollout's images, one of the reverse process
from the sampler steps that made them. Every module has

* ``loss(batch, config)``, with a ``ForwardBatch`` or a ``TransitionBatch`` of :mod:`advflow.algorithms.batch`;
* ``needs(config)``: which frozen policies' velocities the batch has to hold beside the learner's.
"""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Protocol

import torch

import advflow_ext as af
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
from advflow.algorithms.batch import ForwardBatch, TransitionBatch

if TYPE_CHECKING:
    from advflow.algorithms.batch import Needs
    from advflow.settings.config import TrainConfig
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


def check_settings(config: TrainConfig) -> None:
    """Calls the method's own op on a group of images of four elements with the run's settings, before anything exists.

    Raises ValueError with what the op has to say, its option by its place in the configuration.
    """
    name = config.algorithm
    section = REVERSE[name].LOSS.name.removesuffix("_loss") if name in REVERSE else name
    try:
        _loss_of_ones(config)
    except ValueError as error:
        options = {field.name for field in fields(getattr(config, section))}
        text = str(error).replace(", or such a tensor of shape [] or [B]", "")  # which no configuration holds
        raise ValueError(f"{section}.{text}" if text.split(" ")[0] in options else f"{name}: {text}") from error


def _loss_of_ones(config: TrainConfig) -> None:
    count = config.rollout.images_per_prompt
    latent, ones = torch.ones(count, 4), torch.ones(count)
    v = latent.clone().requires_grad_()
    if config.algorithm in FORWARD:
        forward = FORWARD[config.algorithm]
        v_ref = latent if forward.needs(config).reference else None
        forward.loss(ForwardBatch(v, latent, v_ref, latent, latent, ones, ones, ones, reference_scale=1.0), config)
        return
    reverse = REVERSE[config.algorithm]
    table, index = af.StepTable([0.9, 0.6, 0.3, 0.0]), torch.ones(count, dtype=torch.int64)
    v_ref = latent if reverse.needs(config).reference else None
    reverse.loss(TransitionBatch(v, latent, v_ref, latent, table, index, ones), config)
