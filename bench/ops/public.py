"""The losses and the sampler step as the public trainers write them: the baselines called "public".

Rewritten from their formulas and their habits, not copied: casts to fp32 and fp64, fp64 advantages (they come from
numpy), a scheduler that finds every sample's step by comparing timesteps and reading the index back on the host, means
of the next x, log-probabilities with their constants. ``advflow_ext.conformance`` names the trainers and shows that
the formulas are theirs. What only logs (up to a dozen ``.item()`` a call) is left out, to their favour.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Advantages arrive in float64.


def mean(values: Tensor) -> Tensor:
    return values.mean(dim=tuple(range(1, values.dim())))


def column(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.dim() - 1))


# ---------------------------------------------------------------------------------------------------------------------
# Reverse process


class Scheduler:
    """What a trainer keeps of diffusers' Euler scheduler."""

    def __init__(self, sigmas: Tensor, device: torch.device) -> None:
        self.sigmas = sigmas.to(device, torch.float32)
        self.timesteps = 1000 * self.sigmas[:-1]

    def index_for_timestep(self, timestep: Tensor) -> int:
        found = (self.timesteps == timestep).nonzero()
        return int(found[1 if len(found) > 1 else 0].item())

    def sigmas_of(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        steps = [self.index_for_timestep(timestep) for timestep in timesteps]
        following = [step + 1 for step in steps]
        return column(self.sigmas[steps], like), column(self.sigmas[following], like)


Step = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # next x, log-probability, mean, std_dev_t, sqrt(-dt)


def gaussian_log_prob(x_next: Tensor, mu: Tensor, std: Tensor) -> Tensor:
    constant = torch.log(torch.sqrt(2 * torch.as_tensor(math.pi)))
    return mean(-((x_next.detach() - mu) ** 2) / (2 * std**2) - torch.log(std) - constant)


def flow_sde_step(
    scheduler: Scheduler, v: Tensor, timesteps: Tensor, x: Tensor, noise_level: float, x_next: Tensor | None = None
) -> Step:
    """yifan123/flow_grpo's step with log-probability; its standard deviation is std_dev_t sqrt(-dt)."""
    v, x = v.float(), x.float()
    sigma, sigma_next = scheduler.sigmas_of(timesteps, x)
    sigma_max = scheduler.sigmas[1].item()
    dt = sigma_next - sigma
    std_dev_t = torch.sqrt(sigma / (1 - torch.where(sigma == 1, sigma_max, sigma))) * noise_level
    mu = x * (1 + std_dev_t**2 / (2 * sigma) * dt) + v * (1 + std_dev_t**2 * (1 - sigma) / (2 * sigma)) * dt
    sqrt_dt = torch.sqrt(-1 * dt)
    if x_next is None:
        x_next = mu + std_dev_t * sqrt_dt * torch.randn_like(mu)
    return x_next, gaussian_log_prob(x_next.float(), mu, std_dev_t * sqrt_dt), mu, std_dev_t, sqrt_dt


def cps_step(
    scheduler: Scheduler, v: Tensor, timesteps: Tensor, x: Tensor, noise_level: float, x_next: Tensor
) -> tuple[Tensor, Tensor]:
    """IamCreateAI/FlowCPS: log-probability without its variance, and the mean."""
    v, x = v.float(), x.float()
    sigma, sigma_next = scheduler.sigmas_of(timesteps, x)
    std = sigma_next * math.sin(noise_level * math.pi / 2)
    predicted_x0, predicted_noise = x - sigma * v, x + v * (1 - sigma)
    mu = predicted_x0 * (1 - sigma_next) + predicted_noise * torch.sqrt(sigma_next**2 - std**2)
    return mean(-((x_next.float().detach() - mu) ** 2)), mu


def surrogate(ratio: Tensor, advantages: Tensor, clip: float) -> Tensor:
    unclipped = -advantages * ratio
    return torch.mean(torch.maximum(unclipped, -advantages * torch.clamp(ratio, 1.0 - clip, 1.0 + clip)))


def flow_grpo_loss(
    v: Tensor, v_ref: Tensor | None, x: Tensor, x_next: Tensor, timesteps: Tensor, scheduler: Scheduler,
    noise_level: float, log_prob_old: Tensor, advantages: Tensor, clip: float, kl_weight: float,
) -> Tensor:  # fmt: skip
    """yifan123/flow_grpo train_sd3.py: the KL divides by std_dev_t, which lacks sqrt(-dt)."""
    _, log_prob, mu, std_dev_t, _ = flow_sde_step(scheduler, v, timesteps, x, noise_level, x_next)
    loss = surrogate(torch.exp(log_prob - log_prob_old), advantages, clip)
    if v_ref is not None:
        with torch.no_grad():
            _, _, mu_ref, _, _ = flow_sde_step(scheduler, v_ref, timesteps, x, noise_level, x_next)
        loss = loss + kl_weight * torch.mean(mean((mu - mu_ref) ** 2) / (2 * std_dev_t.flatten() ** 2))
    return loss


def grpo_guard_loss(
    v: Tensor, v_ref: Tensor | None, x: Tensor, x_next: Tensor, timesteps: Tensor, scheduler: Scheduler,
    noise_level: float, log_prob_old: Tensor, mean_old: Tensor, advantages: Tensor, clip: float, kl_weight: float,
) -> Tensor:  # fmt: skip
    """yifan123/flow_grpo train_sd3_GRPO_Guard.py: sigma and dt are means over the batch. The drift is each sample's, as
    in verl-project/verl-omni; flow_grpo's line averages it over the batch too."""
    _, log_prob, mu, std_dev_t, sqrt_dt = flow_sde_step(scheduler, v, timesteps, x, noise_level, x_next)
    dt, std = sqrt_dt.mean(), std_dev_t.mean()
    scale = std * dt
    bias = mean((mu - mean_old) ** 2) / (2 * scale**2)
    loss = surrogate(torch.exp((log_prob - log_prob_old + bias) * scale), advantages, clip) / dt**2
    if v_ref is not None:
        with torch.no_grad():
            _, _, mu_ref, _, _ = flow_sde_step(scheduler, v_ref, timesteps, x, noise_level, x_next)
        # With the whole sigma, as everybody else; the released line divides by std_dev_t alone.
        loss = loss + kl_weight * torch.mean(mean((mu - mu_ref) ** 2) / (2 * scale**2))
    return loss


def flow_cps_loss(
    v: Tensor, v_ref: Tensor | None, x: Tensor, x_next: Tensor, timesteps: Tensor, scheduler: Scheduler,
    noise_level: float, log_prob_old: Tensor, advantages: Tensor, clip: float, kl_weight: float,
) -> Tensor:  # fmt: skip
    """IamCreateAI/FlowCPS train_sd3.py."""
    log_prob, mu = cps_step(scheduler, v, timesteps, x, noise_level, x_next)
    loss = surrogate(torch.exp(log_prob - log_prob_old), advantages, clip)
    if v_ref is not None:
        with torch.no_grad():
            _, mu_ref = cps_step(scheduler, v_ref, timesteps, x, noise_level, x_next)
        loss = loss + kl_weight * torch.mean((mu - mu_ref) ** 2)
    return loss


def flow_dppo_loss(
    v: Tensor, v_ref: Tensor | None, x: Tensor, x_next: Tensor, timesteps: Tensor, scheduler: Scheduler,
    noise_level: float, log_prob_old: Tensor, mean_old: Tensor, advantages: Tensor, threshold: float, kl_weight: float,
) -> Tensor:  # fmt: skip
    """Tencent-Hunyuan/UniRL algorithms/flowdppo.py with its later fixes: means in fp32, the sampler's sigma."""
    _, log_prob, mu, std_dev_t, sqrt_dt = flow_sde_step(scheduler, v, timesteps, x, noise_level, x_next)
    std = std_dev_t * sqrt_dt
    ratio = torch.exp(log_prob - log_prob_old)
    kl = mean((mu - mean_old) ** 2 / (2 * std**2))
    keep = (kl < threshold) | ((advantages > 0) & (ratio <= 1)) | ((advantages <= 0) & (ratio >= 1))
    objective = -advantages * ratio
    loss = torch.where(keep.detach(), objective, torch.zeros_like(objective)).mean()
    if v_ref is not None:
        with torch.no_grad():
            _, _, mu_ref, _, _ = flow_sde_step(scheduler, v_ref, timesteps, x, noise_level, x_next)
        loss = loss + kl_weight * torch.mean((mu - mu_ref) ** 2 / (2 * std**2))
    return loss


# ---------------------------------------------------------------------------------------------------------------------
# Forward process


def advantage_flow_loss(
    v: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, advantages: Tensor, v_old: Tensor, v_ref: Tensor | None,
    gamma: float, lam: float,
) -> Tensor:  # fmt: skip
    """arXiv 2605.26013 eq. 5 in predictions of x0, as the DiffusionNFT code base it was built in computes them."""
    t = column(t, v)
    prediction = x_t - t * v
    with torch.no_grad():
        old = x_t - t * v_old
        reference = None if v_ref is None else x_t - t * v_ref
    loss = advantages * mean((prediction - x0) ** 2) + gamma * mean((prediction - old) ** 2)
    if reference is not None:
        loss = loss + lam * mean((prediction - reference) ** 2)
    return loss.mean()


def diffusion_nft_loss(
    v: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, advantages: Tensor, v_old: Tensor, v_ref: Tensor | None,
    beta: float, adv_clip_max: float, kl_weight: float,
) -> Tensor:  # fmt: skip
    """NVlabs/DiffusionNFT train_nft_sd3.py: the float64 scales promote every element of both branches."""
    t = column(t, v)
    clipped = torch.clamp(advantages, -adv_clip_max, adv_clip_max)
    r = torch.clamp((clipped / adv_clip_max) / 2.0 + 0.5, 0, 1)

    def branch(prediction: Tensor) -> Tensor:
        x0_prediction = x_t - t * prediction
        with torch.no_grad():
            scale = column(mean(torch.abs(x0_prediction.double() - x0.double())), v).clip(min=1e-5)
        return mean((x0_prediction - x0) ** 2 / scale)

    positive = branch(beta * v + (1 - beta) * v_old.detach())
    negative = branch((1.0 + beta) * v_old.detach() - beta * v)
    loss = ((r * positive / beta + (1.0 - r) * negative / beta) * adv_clip_max).mean()
    if v_ref is not None:
        loss = loss + kl_weight * torch.mean(mean((v - v_ref) ** 2))
    return loss


def awm_loss(
    v: Tensor, x0: Tensor, noise: Tensor, t: Tensor, advantages: Tensor, v_ema: Tensor, v_ref: Tensor | None,
    clip: float, ema_weight: float, kl_weight: float,
) -> Tensor:  # fmt: skip
    """scxue/advantage_weighted_matching train_sd3_awm.py, weighting ghuber, on policy."""
    error = mean((v.double() - (noise - x0).double()) ** 2)
    log_prob = -t * ((error + 1e-10).pow(0.25) - math.pow(1e-10, 0.25)) / 0.25
    loss = surrogate(torch.exp(log_prob - log_prob.detach()), advantages, clip)
    loss = loss + ema_weight * torch.mean(mean((v - v_ema) ** 2))
    if v_ref is not None:
        loss = loss + kl_weight * torch.mean(mean((v - v_ref) ** 2))
    return loss


def flow_awr_loss(
    v: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, advantages: Tensor, v_old: Tensor, v_ref: Tensor | None,
    kl_weight: float,
) -> Tensor:  # fmt: skip
    """Fuzm7/FlowAWR train_awr_sd3.py: the float64 advantages and scale promote every element."""
    t = column(t, v)
    x0_old = x_t - t * v_old.detach()
    target = x0_old + column(advantages, v) * (x0 - x0_old)
    x0_prediction = x_t - t * v
    with torch.no_grad():
        scale = column(mean(torch.abs(x0_prediction.double() - x0.double())), v).clip(min=1e-5)
    loss = mean((x0_prediction - target) ** 2 / scale).mean()
    if v_ref is not None:
        loss = loss + kl_weight * torch.mean(mean((v - v_ref) ** 2))
    return loss


def reward_weighted_loss(
    v: Tensor, x0: Tensor, noise: Tensor, rewards: Tensor, v_ref: Tensor | None, tau: float, kl_weight: float
) -> Tensor:
    """markerthu/orw-cfm finetune_fm.py, with the sign of our velocities."""
    v = v.float()
    loss = torch.exp(tau * rewards) * mean((v - (noise.float() - x0.float())) ** 2)
    if v_ref is not None:
        loss = loss + kl_weight * mean((v - v_ref.float()) ** 2)
    return loss.mean()
