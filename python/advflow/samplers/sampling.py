"""Images from a policy: deterministic integration of its ODE from noise to latent, and the decoder."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel


@dataclass(frozen=True)
class PromptEmbeddings:
    """What the text encoders say of a list of prompts: `tokens` [N, L, E] and `pooled` [N, P]."""

    tokens: torch.Tensor
    pooled: torch.Tensor

    def __getitem__(self, index: torch.Tensor | slice) -> PromptEmbeddings:
        return PromptEmbeddings(self.tokens[index], self.pooled[index])

    def __len__(self) -> int:
        return len(self.tokens)


def sigma_grid(scheduler: FlowMatchEulerDiscreteScheduler, steps: int) -> list[float]:
    """The scheduler's `steps + 1` noise levels, from 1 (noise) down to 0 (image)."""
    scheduler.set_timesteps(steps)
    sigmas: list[float] = scheduler.sigmas.tolist()
    return sigmas


def velocity(
    transformer: SD3Transformer2DModel, x_t: torch.Tensor, t: torch.Tensor, prompts: PromptEmbeddings
) -> torch.Tensor:
    """The policy's velocity at latents `x_t` [B, C, H, W] and times `t` [B] in (0, 1], 1 being noise.

    Computed in the precision of the prompt embeddings, which is that of the frozen weights.
    """
    return velocity_at(transformer, x_t, timesteps(t), prompts)


def timesteps(t: torch.Tensor) -> torch.Tensor:
    """What the transformer calls the times `t`."""
    return t * 1000.0


def velocity_at(
    transformer: SD3Transformer2DModel, x_t: torch.Tensor, timestep: torch.Tensor, prompts: PromptEmbeddings
) -> torch.Tensor:
    """`velocity` at the `timesteps` [B] of t. Policies that share their modulation have to be given the same tensor."""
    dtype = prompts.tokens.dtype
    with torch.autocast(x_t.device.type, dtype=dtype, enabled=dtype != torch.float32):
        v: torch.Tensor = transformer(x_t.to(dtype), prompts.tokens, prompts.pooled, timestep, return_dict=False)[0]
    return v


@torch.no_grad()
def sample_latents(
    transformer: SD3Transformer2DModel,
    noise: torch.Tensor,
    sigmas: list[float],
    prompts: PromptEmbeddings,
    solver: str = "euler",
) -> torch.Tensor:
    """Integrates dx = v dsigma from `noise` [B, C, H, W] at sigma 1 to the latent at sigma 0, in fp32."""
    x = noise.float()
    step = MultistepDPM(sigmas) if solver == "dpm" else euler_step
    for sigma, next_sigma in itertools.pairwise(sigmas):
        t = torch.full((len(x),), sigma, device=x.device)
        x = step(x, velocity(transformer, x, t, prompts).float(), sigma, next_sigma)
    return x


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


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Images [B, 3, H, W] in [0, 1], fp32. A sample that is not finite decodes to mid grey."""
    scaled = latents / vae.config.scaling_factor + vae.config.shift_factor
    images = vae.decode(scaled.to(vae.dtype), return_dict=False)[0].float()
    return torch.nan_to_num(images / 2 + 0.5, nan=0.5, posinf=0.5, neginf=0.5).clamp_(0, 1)
