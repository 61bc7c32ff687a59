"""verl-project/verl-omni as it is at a1139ba."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from tests.integrations.stand_ins.gaussians import column, log_density, transition

SAMPLERS = {"sde": "flow_sde", "dance_sde": "dance_sde", "cps": "cps"}


class FlowMatchSDEDiscreteScheduler(FlowMatchEulerDiscreteScheduler):
    def sample_previous_step(
        self, sample: Tensor, model_output: Tensor, timestep: Tensor | None = None, generator: Any = None,
        per_token_timesteps: Any = None, noise_level: Any = 0.7, prev_sample: Tensor | None = None,
        sde_type: str = "sde", return_logprobs: bool = True, return_sqrt_dt: bool = False,
        include_logprob_normalizer: bool = True,
    ) -> tuple[Any, ...]:  # fmt: skip
        if timestep is None:
            s, s_end = self.sigmas[self.step_index], self.sigmas[self.step_index + 1]
        else:
            steps = [self.index_for_timestep(t) for t in timestep]
            s, s_end = (column(self.sigmas[places], sample) for places in (steps, [step + 1 for step in steps]))
        level = torch.as_tensor(noise_level, dtype=torch.float32)
        mean, std, sigma = transition(SAMPLERS[sde_type], model_output, sample, s, s_end, level, self.sigmas[1])
        if prev_sample is None:
            prev_sample = mean + sigma * torch.randn(sample.shape, generator=generator)
        log_prob = None
        if return_logprobs:
            log_prob = log_density(prev_sample, mean, sigma * torch.ones(1), variance=sde_type != "cps")
            if sde_type != "cps" and not include_logprob_normalizer:
                log_prob = -((prev_sample - mean) ** 2 / (2 * sigma**2)).flatten(1).mean(1)
        found = prev_sample, log_prob, mean, sigma if sde_type == "dance_sde" else std
        if not return_sqrt_dt:
            return found
        return *found, (s - s_end).sqrt().reshape(-1).expand(len(sample)).clone()


class PPODiffusersFSDPEngine:
    def prepare_model_outputs(self, output: Any, micro_batch: Any) -> dict[str, Any]:
        return dict(zip(("log_probs", "prev_sample_mean", "std_dev_t", "sqrt_dt"), output, strict=True))


class tu:
    @staticmethod
    def get(answer: Any, name: str) -> Any:
        return answer[name]


class PolicyGradientRayTrainer:
    def __init__(self, actor_rollout_wg: Any) -> None:
        self.actor_rollout_wg = actor_rollout_wg

    def _compute_old_log_prob(self, batch: Any) -> tuple[Any, float]:
        answer = self.actor_rollout_wg.infer_actor_batch(batch)
        return SimpleNamespace(batch={"old_log_probs": tu.get(answer, "log_probs").float()}), 0.4


class PolicyGradientDiffusionTrainerV1:
    def __init__(self, actor_rollout_wg: Any) -> None:
        self.actor_rollout_wg = actor_rollout_wg

    def _compute_old_log_prob(self, data: Any) -> Any:
        answer = self.actor_rollout_wg.infer_actor_batch(data)
        return SimpleNamespace(batch={"old_log_probs": tu.get(answer, "log_probs").float()})


MODULES = {
    "verl_omni": (),
    "verl_omni.pipelines": (),
    "verl_omni.pipelines.schedulers": (),
    "verl_omni.pipelines.schedulers.flow_match_sde": (FlowMatchSDEDiscreteScheduler,),
    "verl_omni.workers.engine.fsdp.diffusers_impl": (PPODiffusersFSDPEngine,),
    "verl_omni.trainer.diffusion.ray_diffusion_trainer": (PolicyGradientRayTrainer, tu),
    "verl_omni.trainer.diffusion.v1.trainer_base": (PolicyGradientDiffusionTrainerV1, tu),
}
