"""How many forward passes an iteration and an evaluation take, counted in images."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from advflow.algorithms import make_algorithm
from advflow.processes.reverse import reachable_steps, stochastic_steps
from advflow.settings.config import TrainConfig
from advflow.settings.registry import SAMPLERS


@dataclass(frozen=True)
class Passes:
    """Of one image through the transformer.

    Args:
        drawing: of an iteration's rollout, candidates of a curriculum too; without gradients.
        learning: of the learner, forward and backward.
        comparing: without gradients while it learns: the rollout policy's, the reference's, guidance's.
        evaluation: of one evaluation.
    """

    drawing: int
    learning: int
    comparing: int
    evaluation: int


def passes_of(config: TrainConfig, sigmas: list[float], held_out: int) -> Passes:
    """With guidance a velocity takes two passes, of which the second never has a gradient."""
    rollout, drawn, learnt = config.rollout, _with(config.rollout.guidance), _with(config.learnt_guidance)
    sampler = SAMPLERS.make(rollout.solver, config.section(SAMPLERS, rollout.solver))
    per_image = _calls(sampler, sigmas)
    candidates = (config.capability.candidates or 0) * per_image * drawn
    needs = make_algorithm(config.algorithm, config.method).needs
    if config.process == "forward":
        drawing = rollout.images * per_image
        learning = rollout.images * config.draws.per_image
        others = needs.old + needs.reference
    else:
        drawing = _drawn_by_sde(config)
        trained = max(1, int(config.sde.steps * config.sde.trained_share))
        states = rollout.prompts if config.sde.shared_anchor else rollout.images
        learning = states * trained * config.sde.epochs
        drawing -= learning * config.sde.reweight  # which learns from passes that draw
        others = (config.sde.anchor == "replay") + needs.reference
    comparing = learning * (others * learnt + (learnt - 1))
    scored = held_out * config.evaluation.steps * _with(config.evaluation.guidance)
    return Passes(drawing * drawn + candidates, learning, comparing, scored)


def _with(guidance: float) -> int:
    return 1 if guidance == 1 else 2


def _drawn_by_sde(config: TrainConfig) -> int:
    """Where a group begins in one state, it is one pass up to where its images part; the mean over windows."""
    rollout, sde = config.rollout, config.sde
    if not sde.shared_anchor:
        return rollout.images * rollout.steps
    if sde.branches > 1:
        window = stochastic_steps(sde, rollout.steps, 0, 0)
        together = sum(window[group % sde.branches] + 1 for group in range(rollout.prompts))
    else:
        together = rollout.prompts * ((reachable_steps(sde, rollout.steps) + 1) // 2)
    return together + rollout.images_per_prompt * (rollout.prompts * rollout.steps - together)


def _calls(sampler: object, sigmas: list[float]) -> int:
    """How often the sampler asks for a velocity."""
    calls = 0

    def velocity(x: torch.Tensor, sigma: float) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return torch.zeros_like(x)

    sampler(velocity, torch.zeros(1, 1), sigmas)  # type: ignore[operator]  # as `Sampler` says
    return calls
