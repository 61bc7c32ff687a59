"""What the loop asks of a process: to draw images with the rollout policy, to learn from them, to look at itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch

from advflow.algorithms.batch import Experience, Transitions, WeightedLoss
from advflow.policies import Role
from advflow.processes.metrics import WeightedMetrics
from advflow.samplers.sampling import Conditioning


class Process(Protocol):
    def policy(self, role: Role) -> Any:
        """What `sample` draws with, in force until another policy is."""

    def starting_noise(self, noise: torch.Tensor) -> torch.Tensor:
        """The noise [N, ...] that an iteration's images start from, of what was drawn for them."""

    def sample(
        self,
        policy: Any,
        noise: torch.Tensor,
        conditioning: Conditioning,
        iteration: int,
        first_image: int,
    ) -> tuple[torch.Tensor, Transitions | None]:
        """Latents, or tokens, of some images, the first being the iteration's `first_image`, and the steps to them."""

    def steps(self, iteration: int, experience: Experience) -> Iterator[Iterator[WeightedLoss]]:
        """For each optimiser step the losses of its micro-batches, whose weights sum to 1 over all processes."""

    def diagnose(self, parts: list[WeightedMetrics]) -> dict[str, float]:
        """What the metrics of an iteration's first update, by micro-batch, say about the forward pass itself."""
