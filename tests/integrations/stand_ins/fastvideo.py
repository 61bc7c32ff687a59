"""The steps of XueZeyue/DanceGRPO and Tencent-Hunyuan/MixGRPO, written anew from their conventions.

One index for all samples, a number or 0-dimensional; sigmas are 0-dimensional beside latents, so that a product with a
half-precision velocity stays in half precision.
"""

from __future__ import annotations

import math

import torch

from advflow_ext.conformance import rollout
from advflow_ext.conformance.rows import mean as over_elements


def randn_tensor(shape, generator=None, device=None, dtype=None):
    return torch.randn(shape, generator=generator, device=device, dtype=dtype)


def flux_step(model_output, latents, eta, sigmas, index, prev_sample, grpo, sde_solver):
    """DanceGRPO's."""
    mean, std, predicted_x0 = _dance(model_output, latents, eta, sigmas, index, sde_solver)
    if not grpo:
        return mean, predicted_x0
    if prev_sample is None:
        prev_sample = mean + torch.randn_like(mean) * std
    return prev_sample, predicted_x0, rollout.log_prob(prev_sample.detach().float(), (mean, std))


def dance_grpo_step(model_output, latents, eta, sigmas, index, prev_sample, grpo, sde_solver):
    """MixGRPO's, whose log-probability lacks its constants, and which adds no noise to an Euler step."""
    mean, std, predicted_x0 = _dance(model_output, latents, eta, sigmas, index, sde_solver)
    if not grpo:
        return mean, predicted_x0
    if prev_sample is None:
        prev_sample = mean + torch.randn_like(mean) * std if sde_solver else mean
    return prev_sample, predicted_x0, over_elements(-((prev_sample.detach().float() - mean) ** 2) / (2 * std**2))


def _dance(v, x, eta, sigmas, index, sde_solver):
    s, following = sigmas[index], sigmas[index + 1]
    mean, _ = rollout.dance_sde(v, x, s, following, eta if sde_solver else 0.0)
    return mean, torch.tensor(eta * math.sqrt(s - following)), x - s * v


def flow_grpo_step(model_output, latents, eta, sigmas, index, prev_sample, generator=None, determistic=False):
    """MixGRPO's, which scores an Euler step by the SDE's density, and returns the whole of its sigma."""
    if prev_sample is not None and generator is not None:
        raise ValueError("Cannot pass both generator and prev_sample.")
    v, s, following = model_output, sigmas[index], sigmas[index + 1]
    dt = following - s
    std_dev_t = eta * (s / (1 - (sigmas[1] if s == 1 else s))).sqrt()
    drift = std_dev_t**2 / (2 * s)
    mean = latents * (1 + drift * dt) + v * (1 + drift * (1 - s)) * dt
    std = std_dev_t * (-dt).sqrt()
    if prev_sample is None:
        prev_sample = mean + std * randn_tensor(v.shape, generator=generator, device=v.device, dtype=v.dtype)
    if determistic:
        prev_sample = latents + dt * v
    return prev_sample, latents - s * v, rollout.log_prob(prev_sample.detach(), (mean, std)), mean, std


def dpm_step(
    args,
    model_output,
    sample,
    step_index,
    timesteps,
    sigmas,
    dpm_state=None,
    generator=None,
    variance_noise=None,
    sde_solver=False,
):
    return "dpmsolver's own", step_index, sde_solver
