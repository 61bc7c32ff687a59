"""AdvantageFlow (arXiv 2605.26013): advantage-weighted flow matching, anchored to the rollout policy."""

from __future__ import annotations

import torch

import advflow_ext as af
from advflow.algorithms.batch import ForwardBatch, Needs
from advflow.settings.methods import AdvantageFlowConfig

START_GAMMA = 0.5  # of "auto": the best on both rewards of docs/learning.md
LEAST_CURVATURE = 0.1  # what the paper's gamma of 1.1 leaves of the worst advantage, -1, without a reference


class AdvantageFlow:
    def __init__(self, settings: AdvantageFlowConfig) -> None:
        self._settings = settings
        self.needs = Needs(old=True, reference=settings.lam > 0)

    def loss(self, batch: ForwardBatch) -> af.LossOutput:
        assert batch.v_old is not None
        settings = self._settings
        advantages, lam = batch.advantages + settings.offset, settings.lam * batch.reference_scale
        gamma: float | str | torch.Tensor = settings.gamma
        beta = settings.beta
        if gamma == "auto":
            weight = START_GAMMA if batch.rollout_weight is None else batch.rollout_weight
            # A gamma that grows takes weight from the data, rather than giving it to the rollout policy: Adam, which
            # remembers the gradients of a thousand steps, would take the larger ones for a longer step.
            scale = START_GAMMA / weight
            gamma = scale * self._convex(advantages, lam, weight)
            beta, lam = scale * beta, scale * lam
        return af.advantage_flow_loss(
            batch.v,
            batch.x0,
            batch.noise,
            batch.t,
            advantages,
            v_old=batch.v_old,
            v_ref=batch.v_ref,
            gamma=gamma,
            lam=lam,
            weighting=settings.weighting,
            beta=beta,
        )

    def _convex(self, advantages: torch.Tensor, lam: float, gamma: float) -> torch.Tensor:
        """gamma, raised for the samples that it would leave without a minimum."""
        needed = LEAST_CURVATURE - self._settings.beta * advantages - lam
        return needed.nan_to_num().clamp(min=gamma)
