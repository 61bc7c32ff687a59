"""What the loop asks of a process: to draw images with the rollout policy, to learn from them, to look at itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from diffusers import SD3Transformer2DModel

from advflow.algorithms import REVERSE
from advflow.algorithms.batch import Rollout, Transitions, WeightedLoss
from advflow.control.reference import ReferenceControl
from advflow.models.sd3 import LatentShape
from advflow.policies import Policies
from advflow.processes.forward import Draws, ForwardProcess
from advflow.processes.metrics import WeightedMetrics
from advflow.processes.reverse import ReverseProcess
from advflow.samplers.sampling import PromptEmbeddings
from advflow.settings.config import TrainConfig


class Process(Protocol):
    # Whether images may be drawn on merged weights; what a ratio is anchored on may not.
    for_images: bool

    def starting_noise(self, noise: torch.Tensor) -> torch.Tensor:
        """The noise [N, C, H, W] that an iteration's images start from, of what was drawn for them."""

    def sample(
        self,
        transformer: SD3Transformer2DModel,
        noise: torch.Tensor,
        prompts: PromptEmbeddings,
        iteration: int,
        first_image: int,
    ) -> tuple[torch.Tensor, Transitions | None]:
        """Latents [B, C, H, W] of some images, the first being the iteration's `first_image`, and the steps to them."""

    def steps(self, iteration: int, rollout: Rollout) -> Iterator[Iterator[WeightedLoss]]:
        """For each optimiser step the losses of its micro-batches, whose weights sum to 1."""

    def diagnose(self, parts: list[WeightedMetrics]) -> dict[str, float]:
        """What the metrics of an iteration's first update, by micro-batch, say about the forward pass itself."""


def make_process(
    config: TrainConfig, policies: Policies, latent: LatentShape, sigmas: list[float], control: ReferenceControl
) -> Process:
    if config.algorithm in REVERSE:
        return ReverseProcess(config, policies, sigmas)
    return ForwardProcess(config, policies, Draws(config.draws, latent, sigmas, config.seed), sigmas, control)
