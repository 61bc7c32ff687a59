"""Images from a policy: deterministic integration of its ODE from noise to latent."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Protocol, Self

import torch


class Conditioning(Protocol):
    """What a policy is told of a list of prompts; a model family's own, indexed by their places."""

    def __getitem__(self, index: torch.Tensor | slice) -> Self: ...

    def __len__(self) -> int: ...


Velocity = Callable[[torch.Tensor, torch.Tensor, Conditioning], torch.Tensor]
"""A policy's velocity at latents x [B, ...] and times t [B] in (0, 1], 1 being noise."""


@torch.no_grad()
def sample_latents(
    velocity: Velocity,
    noise: torch.Tensor,
    sigmas: list[float],
    conditioning: Conditioning,
    solver: str = "euler",
) -> torch.Tensor:
    """Integrates dx = v dsigma from `noise` [B, ...] at sigma 1 to the latent at sigma 0, in fp32."""
    x = noise.float()
    step = MultistepDPM(sigmas) if solver == "dpm" else euler_step
    for sigma, next_sigma in itertools.pairwise(sigmas):
        t = torch.full((len(x),), sigma, device=x.device)
        x = step(x, velocity(x, t, conditioning).float(), sigma, next_sigma)
    return x


def like(values: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """`values` [B], one for each of `latents` [B, ...], in a shape that broadcasts."""
    return values.view(-1, *(1,) * (latents.dim() - 1))


def euler_step(x: torch.Tensor, v: torch.Tensor, sigma: float, next_sigma: float) -> torch.Tensor:
    return x + (next_sigma - sigma) * v


class MultistepDPM:
    """DPM-Solver++(2M) in half-log-SNR with data prediction, the rollout solver of DiffusionNFT's code ("dpm2").

    Alpha = 1 - sigma, lambda = log(alpha / sigma). The first and the last step are of first order: at sigma 1 and at
    sigma 0 lambda is infinite, and the second-order term vanishes with 1 / r.
    """

    def __init__(self, sigmas: list[float]) -> None:
        self._last = sigmas[-2]
        self._x0: torch.Tensor | None = None  # the data prediction of the step before
        self._h = math.inf  # and its length in lambda

    def __call__(self, x: torch.Tensor, v: torch.Tensor, sigma: float, next_sigma: float) -> torch.Tensor:
        x0 = x - sigma * v
        h = _half_log_snr(next_sigma) - _half_log_snr(sigma)
        direction = x0
        if self._x0 is not None and sigma != self._last and math.isfinite(self._h):
            direction = x0 + (h / (2 * self._h)) * (x0 - self._x0)
        self._x0, self._h = x0, h
        return (next_sigma / sigma) * x - (1 - next_sigma) * math.expm1(-h) * direction


def _half_log_snr(sigma: float) -> float:
    if sigma >= 1:
        return -math.inf
    return math.log((1 - sigma) / sigma) if sigma > 0 else math.inf
