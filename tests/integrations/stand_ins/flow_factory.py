"""X-GenGroup/Flow-Factory as it is at a0b2bc5."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from tests.integrations.stand_ins.gaussians import column, log_density, transition

SAMPLERS = {"Flow-SDE": "flow_sde", "Dance-SDE": "dance_sde", "CPS": "cps"}


@dataclass
class SDESchedulerOutput:
    next_latents: Tensor | None = None
    next_latents_mean: Tensor | None = None
    std_dev_t: Tensor | None = None
    dt: Tensor | None = None
    log_prob: Tensor | None = None
    noise_pred: Tensor | None = None


class FlowMatchEulerDiscreteSDEScheduler(FlowMatchEulerDiscreteScheduler):
    def __init__(self, noise_level: float = 0.7, dynamics_type: str = "Flow-SDE", **config: Any) -> None:
        super().__init__(**config)
        self.noise_level, self.dynamics_type, self.is_eval = noise_level, dynamics_type, False

    def eval(self) -> None:
        self.is_eval = True

    def get_noise_level_for_sigma(self, sigma: Tensor) -> Tensor:
        steps = (sigma[:, None] == self.sigmas).int().argmax(1)
        return torch.where(steps < len(self.timesteps) - 1, self.noise_level, 0.0)

    def step(
        self, noise_pred: Tensor, timestep: Any, latents: Tensor, next_latents: Tensor | None = None,
        timestep_next: Any = None, generator: Any = None, noise_level: Any = None, compute_log_prob: bool = True,
        return_dict: bool = True,
        return_kwargs: Any = ["next_latents", "next_latents_mean", "std_dev_t", "dt", "log_prob", "noise_pred"],  # noqa: B006
        dynamics_type: str | None = None, sigma_max: float | None = None,
    ) -> Any:  # fmt: skip
        if timestep_next is None:
            times = [] if isinstance(timestep, int) else torch.as_tensor(timestep).reshape(-1)
            steps = [self.index_for_timestep(t) for t in times] or [timestep]
            s, s_end = self.sigmas[steps], self.sigmas[[step + 1 for step in steps]]
        else:
            s, s_end = timestep / 1000, timestep_next / 1000
        dynamics = dynamics_type or self.dynamics_type
        if self.is_eval:
            noise_level = 0.0
        elif noise_level is None:
            noise_level = self.get_noise_level_for_sigma(s)
        v, x = noise_pred.float(), latents.float()
        s, s_end, level, s_1 = (column(n, x) for n in (s, s_end, noise_level, sigma_max or self.sigmas[1].item()))
        if dynamics == "ODE":
            mean, std, sigma = x + (s_end - s) * v, 0 * s, 0 * s
        else:
            mean, std, sigma = transition(SAMPLERS[dynamics], v, x, s, s_end, level, s_1)
        if next_latents is not None:
            x_next = next_latents.float()
        elif dynamics == "ODE":
            x_next = mean
        else:
            noise = torch.randn(v.shape, generator=generator)
            x_next = (mean + sigma * noise).to(latents.dtype).float()
        log_prob = None
        if compute_log_prob:
            log_prob = (
                torch.zeros(len(x))
                if dynamics == "ODE"
                else log_density(x_next, mean, sigma, variance=dynamics != "CPS")
            )
        if not return_dict:
            return x_next, mean, v, log_prob, std, s_end - s
        found = {
            "next_latents": x_next, "next_latents_mean": mean, "std_dev_t": std, "dt": s_end - s, "log_prob": log_prob,
            "noise_pred": v,
        }  # fmt: skip
        return SDESchedulerOutput(**{name: found[name] for name in return_kwargs})


def set_scheduler_timesteps(scheduler: Any, num_inference_steps: int, mu: float) -> None:
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / num_inference_steps, num_inference_steps), mu=mu)


class AWMTrainer:
    @staticmethod
    def compute_weighted_log_prob(
        model_output: Tensor, target: Tensor, timestep: Tensor, weighting: str = "Uniform", ghuber_power: float = 0.25
    ) -> Tensor:
        error = (model_output.double() - target.double()).square().flatten(1).mean(1)
        t = (timestep.view(-1) / 1000).clamp(0, 1)
        if weighting == "huber":
            return (-t * ((error + 1e-10).sqrt() - 1e-5)).float()
        if weighting == "ghuber":
            return (-t / ghuber_power * ((error + 1e-10) ** ghuber_power - 1e-10**ghuber_power)).float()
        return (-error * {"Uniform": 1, "t": t, "t**2": t**2}[weighting]).float()


MODULES = {
    "flow_factory": (),
    "flow_factory.scheduler": (),
    "flow_factory.scheduler.flow_match_euler_discrete": (
        FlowMatchEulerDiscreteSDEScheduler, SDESchedulerOutput, set_scheduler_timesteps,
    ),
    "flow_factory.trainers": (),
    "flow_factory.trainers.awm": (AWMTrainer,),
}  # fmt: skip
