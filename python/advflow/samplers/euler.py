"""Euler's method."""

from __future__ import annotations

import itertools

import torch

from advflow.samplers.sampling import VelocityAt


class Euler:
    def __call__(self, velocity: VelocityAt, x: torch.Tensor, sigmas: list[float]) -> torch.Tensor:
        for sigma, next_sigma in itertools.pairwise(sigmas):
            x = euler_step(x, velocity(x, sigma), sigma, next_sigma)
        return x


def euler_step(x: torch.Tensor, v: torch.Tensor, sigma: float, next_sigma: float) -> torch.Tensor:
    """A step of `af.StepTable(sampler="ode")`, which `af.sde_step` rounds once and this twice."""
    return x + (next_sigma - sigma) * v
