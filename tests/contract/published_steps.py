"""Samplers and their steps as each public repository writes them, for the tests here."""

from __future__ import annotations

import math

import torch

from advflow_ext.testing.transition_strategies import shifted

COLUMNS = ("s", "s_end", "c_x", "c_v", "sigma", "kappa", "dt")


def twice_shifted(steps: int, shift: float = 3.0) -> torch.Tensor:
    """What diffusers' Euler scheduler makes of a static shift: once for its limits, once more for its steps."""
    lowest = shift * 1e-3 / (1 + (shift - 1) * 1e-3)
    s = torch.linspace(1, lowest, steps, dtype=torch.float64)
    return torch.cat([shift * s / (1 + (shift - 1) * s), torch.zeros(1, dtype=torch.float64)])


SCHEDULES = {"once": shifted, "twice": twice_shifted}
SAMPLERS = [("flow_sde", 0.7), ("flow_sde", 0.8), ("dance_sde", 0.3), ("cps", 0.7), ("cps", 0.8), ("flash_sde", 0.9)]


def published_step(sampler, level, sigmas, k, x, v):
    """Mean and standard deviation, line by line as released."""
    s, following = float(sigmas[k]), float(sigmas[k + 1])
    dt = following - s
    if sampler == "flow_sde":  # yifan123/flow_grpo, sd3_sde_with_logprob.py
        std_dev_t = math.sqrt(s / (1 - (float(sigmas[1]) if s == 1 else s))) * level
        mean = x * (1 + std_dev_t**2 / (2 * s) * dt) + v * (1 + std_dev_t**2 * (1 - s) / (2 * s)) * dt
        return mean, std_dev_t * math.sqrt(-dt)
    if sampler == "dance_sde":  # XueZeyue/DanceGRPO, train_grpo_flux.py
        pred_original = x - s * v
        score = -(x - pred_original * (1 - s)) / s**2
        return x + dt * v - 0.5 * level**2 * score * dt, level * math.sqrt(-dt)
    if sampler == "flash_sde":  # Shredded-Pork/Flash-GRPO, wan2_1_pipeline_with_logprob2.py; UniRL's eta in front
        sigma_max, sigma_min = float(sigmas[1]), float(sigmas[-1])
        std_dev_t = (sigma_min + (sigma_max - sigma_min) * s) * level
        mean = x * (1 + std_dev_t**2 / (2 * s) * dt) + v * (1 + std_dev_t**2 * (1 - s) / (2 * s)) * dt
        return mean, std_dev_t * math.sqrt(-dt)
    # IamCreateAI/FlowCPS, sd3_sde_with_logprob.py
    std_dev_t = following * math.sin(level * math.pi / 2)
    pred_original, pred_noise = x - s * v, x + (1 - s) * v
    return pred_original * (1 - following) + pred_noise * math.sqrt(following**2 - std_dev_t**2), std_dev_t


def same_rows(table, expected):
    return all(torch.equal(getattr(table, name), getattr(expected, name)) for name in COLUMNS)
