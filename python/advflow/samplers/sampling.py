"""Images from a policy: deterministic integration of its ODE from noise to latent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, Self

import torch


class Conditioning(Protocol):
    """What a policy is told of a list of prompts; a model family's own, indexed by their places."""

    def __getitem__(self, index: torch.Tensor | slice) -> Self: ...

    def __len__(self) -> int: ...


Velocity = Callable[[torch.Tensor, torch.Tensor, Conditioning], torch.Tensor]
"""A policy's velocity at latents x [B, ...] and times t [B] in (0, 1], 1 being noise."""


VelocityAt = Callable[[torch.Tensor, float], torch.Tensor]
"""The same at one noise level for all, in fp32, of prompts that are settled."""


class Sampler(Protocol):
    """A way of drawing images. It keeps nothing from one call to the next."""

    def __call__(self, velocity: VelocityAt, x: torch.Tensor, sigmas: list[float]) -> torch.Tensor:
        """Integrates dx = v dsigma over `sigmas` from `x` [B, ...] at the first to what is returned at the last."""
        ...


@torch.no_grad()
def sample_latents(
    velocity: Velocity,
    noise: torch.Tensor,
    sigmas: list[float],
    conditioning: Conditioning,
    sampler: Sampler,
) -> torch.Tensor:
    """Draws from `noise` [B, ...] at sigma 1 the latents at sigma 0, in fp32."""

    def velocity_at(x: torch.Tensor, sigma: float) -> torch.Tensor:
        return velocity(x, torch.full((len(x),), sigma, device=x.device), conditioning).float()

    return sampler(velocity_at, noise.float(), sigmas)


def like(values: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """`values` [B], one for each of `latents` [B, ...], in a shape that broadcasts."""
    return values.view(-1, *(1,) * (latents.dim() - 1))
