"""The transitions of arXiv 2505.05470, 2505.07818 and 2509.05952, and their density, in the dtype of what is given."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def transition(
    sampler: str, v: Tensor, x: Tensor, s: Tensor, s_end: Tensor, level: Tensor, s_1: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, std_dev_t as Flow-GRPO has it, and the whole sigma; s and level broadcast to x."""
    dt = s_end - s
    data, noise = x - s * v, x + (1 - s) * v
    if sampler == "cps":
        sigma = s_end * torch.sin(level * math.pi / 2)
        return (1 - s_end) * data + torch.sqrt(s_end**2 - sigma**2) * noise, sigma, sigma
    std = torch.sqrt(s / (1 - torch.where(s == 1, s_1, s))) * level if sampler == "flow_sde" else level + 0 * s
    drift = v + std**2 / (2 * s) * noise
    return x + drift * dt, std, std * torch.sqrt(-dt)


def log_density(x_next: Tensor, mean: Tensor, sigma: Tensor, *, variance: bool = True) -> Tensor:
    """Averaged over all but the first dimension."""
    square = (x_next.detach() - mean) ** 2
    elements = -square / (2 * sigma**2) - torch.log(sigma) - math.log(2 * math.pi) / 2 if variance else -square
    return elements.flatten(1).mean(1)


def column(number: float | Tensor, like: Tensor) -> Tensor:
    """One number a sample in the dtype of ``like``, shaped to broadcast to it."""
    given = torch.as_tensor(number).to(like.device, like.dtype)
    return (
        given.expand(like.shape[0]).view(-1, *[1] * (like.dim() - 1))
        if given.numel() == 1
        else given.view(-1, *[1] * (like.dim() - 1))
    )
