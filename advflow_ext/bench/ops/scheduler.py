"""What public trainers keep of diffusers' scheduler, and what it costs them: every sample's step is looked up by its
timestep, and the index read back on the host."""

from __future__ import annotations

import torch
from torch import Tensor

from advflow_ext.conformance.rollout import Gaussian, cps, flow_sde_in_parts
from advflow_ext.conformance.rows import column


class Scheduler:
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

    def flow_sde_in_parts(
        self, v: Tensor, x: Tensor, timesteps: Tensor, noise_level: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        s, following = self.sigmas_of(timesteps, x)
        return flow_sde_in_parts(v, x, s, following, noise_level, self.sigmas[1].item())

    def flow_sde(self, v: Tensor, x: Tensor, timesteps: Tensor, noise_level: float) -> Gaussian:
        mu, std_dev_t, sqrt_dt = self.flow_sde_in_parts(v, x, timesteps, noise_level)
        return mu, std_dev_t * sqrt_dt

    def cps(self, v: Tensor, x: Tensor, timesteps: Tensor, noise_level: float) -> Gaussian:
        s, following = self.sigmas_of(timesteps, x)
        return cps(v, x, s, following, noise_level)
