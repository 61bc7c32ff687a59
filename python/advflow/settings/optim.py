"""The optimiser, the rollout policy that follows the learner, the pull towards the reference."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from advflow.settings.numbers import require


@dataclass
class OptimConfig:
    """AdamW and the batches it sees.

    Args:
        lr: learning rate.
        warmup: optimiser steps over which the learning rate rises linearly from 0. AdamW's first steps move every
            weight by the learning rate however small its gradient, which a pretrained model remembers.
        decay: "second_half" lets the learning rate fall linearly to 0 over the run's second half, "none" keeps it.
        hold: optimiser steps after which the learning rate also falls like hold / step, so that a run of any length
            takes few long steps; null for never.
        betas: decay rates of AdamW's two moments.
        eps: AdamW's denominator constant.
        weight_decay: decoupled weight decay.
        max_grad_norm: gradients are scaled down to this norm.
        steps_per_iteration: optimiser steps made of one rollout: each takes an equal share of the images, or of the
            pairs of the forward process, by draws.split.
        micro_batch: samples in one forward and backward pass; gradients accumulate over a step.
    """

    lr: float = 2e-4
    warmup: int = 10
    decay: Literal["none", "second_half"] = "second_half"
    hold: int | None = 100
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-4
    max_grad_norm: float = 1.0
    steps_per_iteration: int = 1
    micro_batch: int = 128

    def __post_init__(self) -> None:
        require(self.lr > 0, "optim.lr", self.lr, "a positive number")
        require(self.warmup >= 0, "optim.warmup", self.warmup, "zero or more steps")
        require(self.hold is None or self.hold >= 1, "optim.hold", self.hold, "1 or more steps, or null")
        require(all(0 <= beta < 1 for beta in self.betas), "optim.betas", self.betas, "two numbers in [0, 1)")
        require(self.eps > 0, "optim.eps", self.eps, "a positive number")
        require(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, "zero or a positive number")
        require(self.max_grad_norm > 0, "optim.max_grad_norm", self.max_grad_norm, "a positive number")
        require(self.steps_per_iteration >= 1, "optim.steps_per_iteration", self.steps_per_iteration, "1 or more")
        require(self.micro_batch >= 1, "optim.micro_batch", self.micro_batch, "1 or more")


@dataclass
class RolloutPolicyConfig:
    """How the rollout policy follows the learner: theta_old <- rho theta_old + (1 - rho) theta after each iteration.

    rho = min(max(rate * (step - start), 0), maximum), step counting optimiser steps. DiffusionNFT's code has
    (rate, start, maximum) = (0.001, 0, 0.5) by default and (0.0075, 75, 0.999) for OCR; rate 0 copies the learner.

    Args:
        rate: growth of rho per optimiser step.
        start: optimiser step at which rho starts to grow.
        maximum: upper bound of rho.
    """

    rate: float = 0.01
    start: int = 0
    maximum: float = 0.5

    def __post_init__(self) -> None:
        require(self.rate >= 0, "rollout_policy.rate", self.rate, "zero or a positive number")
        require(self.start >= 0, "rollout_policy.start", self.start, "zero or more steps")
        require(0 <= self.maximum < 1, "rollout_policy.maximum", self.maximum, "a number in [0, 1)")


@dataclass
class ReferenceConfig:
    """How far from the reference policy a method of the forward process settles.

    Args:
        target_deviation: mean <(v - v_ref)^2> over the drawn t, so it depends on those and on the model. While it is
            exceeded, the algorithm's weight of the reference grows, by up to 2 % an iteration; below, the weight
            returns to what was set: the adaptive KL penalty of arXiv 1909.08593. No bound: a weight that is orders of
            magnitude too small takes hundreds of iterations to grow, and one of 0 stays 0. null: no such control.
    """

    target_deviation: float | None = 0.15

    def __post_init__(self) -> None:
        require(
            self.target_deviation is None or 0 < self.target_deviation < math.inf,
            "reference.target_deviation",
            self.target_deviation,
            "a positive number, or null",
        )
