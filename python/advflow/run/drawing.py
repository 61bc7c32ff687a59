"""How the policies of a run draw images that are looked at and scored, whatever kind of model they are."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import cast

import torch

from advflow.models.family import Images, Latents
from advflow.policies import Policies, Role, velocity_of
from advflow.samplers.euler import Euler
from advflow.samplers.sampling import Conditioning, Sampler, sample_latents
from advflow.samplers.tokens import draw_tokens
from advflow.settings.config import TrainConfig

Draw = Callable[[torch.Tensor, Conditioning], torch.Tensor]
"""What `Images` decode, [B, ...], from their random numbers [B, ...] and what the policy is told of each."""


def draw_of(
    config: TrainConfig, policies: Policies, latents: Images, role: Role, steps: int, sampler: Sampler | None = None
) -> Draw:
    """That of `role`, in force until another policy is; a flow's with so many `steps`, Euler's by default."""
    if config.process == "tokens":
        return partial(draw_tokens, policies.transformer(role))
    velocity, sigmas = velocity_of(policies, role, for_images=True), cast(Latents, latents).sigmas(steps)
    solver = sampler or Euler()
    return lambda noise, told: sample_latents(velocity, noise, sigmas, told, solver)
