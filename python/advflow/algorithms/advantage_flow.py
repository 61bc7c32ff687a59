"""AdvantageFlow (arXiv 2605.26013): advantage-weighted flow matching, anchored to the rollout policy."""

from __future__ import annotations

import torch

import advflow_ext as af
from advflow.algorithms.batch import ForwardBatch, Needs
from advflow.settings.methods import AdvantageFlowConfig

LEAST_CURVATURE = 0.1  # what the paper's gamma of 1.1 leaves of the worst advantage, -1, without a reference


class AdvantageFlow:
    def __init__(self, settings: AdvantageFlowConfig) -> None:
        self._settings = settings
        self.needs = Needs(old=True, reference=settings.lam > 0)

    def loss(self, batch: ForwardBatch) -> af.LossOutput:
        assert batch.v_old is not None
        advantages, lam = batch.advantages + self._settings.offset, self._settings.lam * batch.reference_scale
        return af.advantage_flow_loss(
            batch.v,
            batch.x0,
            batch.noise,
            batch.t,
            advantages,
            v_old=batch.v_old,
            v_ref=batch.v_ref,
            gamma=self._gamma(advantages, lam, batch.rollout_weight),
            lam=lam,
            weighting=self._settings.weighting,
            beta=self._settings.beta,
        )

    def _gamma(self, advantages: torch.Tensor, lam: float, chosen: float) -> float | str | torch.Tensor:
        """That of the settings. The run's own is raised for the samples that it would leave without a minimum."""
        if self._settings.gamma != "auto":
            return self._settings.gamma
        needed = LEAST_CURVATURE - self._settings.beta * advantages - lam
        return needed.nan_to_num().clamp(min=chosen)
