"""Tencent-Hunyuan/UniRL as it is at 1a7b501."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.integrations.stand_ins.gaussians import column, log_density, transition


class StepStrategy:
    sampler = "ode"

    def denoise(
        self, noise_pred: Tensor, sample: Tensor, sigma: Tensor, sigma_next: Tensor, *, eta: float = 1.0,
        prev_sample: Tensor | None = None, sigma_max: Any = 0.99, step_index: int = 0,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
        v, x = noise_pred.float(), sample.float()
        s, s_end, level, s_1 = (column(n, x) for n in (sigma.float(), sigma_next.float(), eta, sigma_max))
        if self.sampler == "ode":
            return x + (s_end - s) * v, None, None
        mean, _, std = transition(self.sampler, v, x, s, s_end, level, s_1)
        x_next = mean + std * torch.randn(v.shape) if prev_sample is None else prev_sample.float()
        if eta < 1e-7:
            return x_next, None, mean
        x_next = x_next.to(sample.dtype).float()
        return x_next, log_density(x_next, mean, std, variance=self.sampler != "cps"), mean


class SDEStrategy(StepStrategy):
    pass


class FlowSDEStrategy(SDEStrategy):
    sampler = "flow_sde"


class CPSSDEStrategy(SDEStrategy):
    sampler = "cps"


class DanceSDEStrategy(SDEStrategy):
    sampler = "dance_sde"


class DPM2Strategy(StepStrategy):
    def init_schedule(self, sigmas: Tensor) -> None:
        pass


@dataclass
class AlgorithmStepResult:
    loss: float
    metrics: dict[str, float]
    num_steps_or_tokens: int
    has_backward: bool


def typed_conditions(conditions: Any, conditions_cls: Any) -> Any:
    return conditions


def gather_sde_field(tensor: Tensor, sde_indices: Tensor, target_steps: list[int], *, field_name: str = "") -> Tensor:
    return tensor[:, [sde_indices.tolist().index(step) for step in target_steps]]


class FlowDPPO:
    def __init__(
        self, *, params: Any, stage: Any, kl_mask_threshold: float = 1e-5, add_kl_coefficient: bool = True,
        old_logp_source: str = "rollout", conditions_cls: Any = None,
    ) -> None:  # fmt: skip
        self.params, self.stage, self.conditions_cls = params, stage, conditions_cls
        self.kl_mask_threshold, self.add_kl_coefficient = kl_mask_threshold, add_kl_coefficient
        self.old_logp_source = old_logp_source

    def prepare_segment(self, *, conditions: Any, segment: Any) -> None:
        with torch.no_grad():
            found = self.stage.replay(
                conditions, segment=segment, params=self.params, step_indices=self._resolve_target_steps(segment)
            )
        if self.old_logp_source == "replay":
            segment.sde_logp = found.log_probs.cpu()
        segment.sde_means = found.prev_sample_means.cpu()

    def compute_loss_and_backward(
        self, *, conditions: Any, segment: Any, advantages: Tensor, training_progress: float, loss_scale: float
    ) -> AlgorithmStepResult:
        steps = self._resolve_target_steps(segment)
        found = self.stage.replay(conditions, segment=segment, params=self.params, step_indices=steps)
        log_ratio = found.log_probs - segment.sde_logp.to(found.log_probs)
        kl = (found.prev_sample_means - segment.sde_means) ** 2 / (
            2 * self._compute_sigma_t(segment, steps, "cpu") ** 2
        )
        far = kl.flatten(2).mean(2) >= self.kl_mask_threshold
        A = advantages[:, None].expand_as(log_ratio)
        masked = far & (A * (log_ratio.exp() - 1) > 0)
        loss = torch.where(masked, 0, -A * log_ratio.exp()).mean()
        (loss * loss_scale).backward()
        return AlgorithmStepResult(loss.item(), {"masked_fraction": masked.float().mean().item()}, len(steps), True)

    def _resolve_target_steps(self, segment: Any) -> list[int]:
        return segment.sde_indices.tolist()

    def _compute_sigma_t(self, segment: Any, target_steps: list[int], device: Any) -> Tensor:
        if not self.add_kl_coefficient:
            return torch.ones(1, len(target_steps), 1, 1, 1)
        s, s_end = segment.sigmas[target_steps].float(), segment.sigmas[[step + 1 for step in target_steps]].float()
        return (self.params.eta * (s / (1 - s.clamp(max=0.99))).sqrt() * (s - s_end).sqrt()).view(1, -1, 1, 1, 1)


MODULES = {
    "unirl": (),
    "unirl.sde": (),
    "unirl.sde.kernels": (
        StepStrategy, SDEStrategy, FlowSDEStrategy, CPSSDEStrategy, DanceSDEStrategy, DPM2Strategy,
    ),
    "unirl.algorithms": (),
    "unirl.algorithms.flowdppo": (FlowDPPO, AlgorithmStepResult, typed_conditions, gather_sde_field),
}  # fmt: skip
