"""Where on the way between noise and image is learnt."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

from advflow.settings.numbers import require
from advflow.settings.registry import STOCHASTIC_SAMPLERS

StochasticSampler: TypeAlias = Literal[tuple(STOCHASTIC_SAMPLERS)]  # type: ignore[valid-type]  # names that a checker cannot read


@dataclass
class SDEConfig:
    """The stochastic sampler of the reverse-process methods, and which of its steps are learnt from.

    Args:
        sampler: "flow_sde" (Flow-GRPO), "dance_sde" (DanceGRPO) or "cps" (Flow-CPS); see advflow.samplers.stochastic.
        noise_level: a of Flow-SDE, eta of the other two.
        window: which steps are stochastic, the others being Euler steps of the ODE: the "first" `steps`, `steps`
            drawn at "random" or in a "random_window" from the first `within`, a window "sliding" from the noisy end to
            the clean one and over again (MixGRPO), or a "branch" (Flow-GRPO-Fast): one trajectory a group up to a
            random window within the first `within` steps, where its images part.
        branches: of window "branch" with one step: at how many steps, spread evenly over the first `within`, the groups
            of an iteration part, one group after another at the next of them (AdaGRPO's code: 4 of 8); 1: all at a
            random one.
        steps: stochastic steps.
        within: the steps that "random", "random_window" and "branch" choose from; null is the first half.
        shift_every: iterations after which a sliding window moves on by one step.
        shared_noise: all images of a group start from the same noise (DanceGRPO).
        shared_anchor: of window "branch" with one step: up to it a group is one trajectory, and at it all losses of its
            images are one pass of the network, forward and backward (AdaGRPO's sampler). Needs a rollout.batch that
            splits no group.
        trained_share: share of an image's stochastic steps that are learnt from, drawn anew for each image.
        anchor: "stored" keeps the rollout's own velocities as v_old; "replay" computes them again in the batches
            that training uses, for networks whose output depends on the batch.
        epochs: how often a rollout's images are learnt from.
        reweight: back-propagate each stochastic step as it is drawn, for an advantage of 1, and scale every image's
            gradient when its reward has come: one forward pass a step less, the same gradient up to rounding
            (LeanGRPO, arXiv 2609.03528). For one update an iteration of a policy that draws for itself, LoRA. Holds
            the adapter's gradient of every image, and the activations of rollout.batch images.
    """

    sampler: StochasticSampler = "flow_sde"
    noise_level: float = 0.7
    window: Literal["first", "random", "random_window", "sliding", "branch"] = "first"
    steps: int = 9
    within: int | None = None
    branches: int = 1
    shift_every: int = 25
    shared_noise: bool = False
    shared_anchor: bool = False
    trained_share: float = 1.0
    anchor: Literal["stored", "replay"] = "stored"
    epochs: int = 1
    reweight: bool = False

    def __post_init__(self) -> None:
        require(self.noise_level > 0, "sde.noise_level", self.noise_level, "a positive number")
        require(self.steps >= 1, "sde.steps", self.steps, "1 or more")
        require(self.within is None or self.within >= self.steps, "sde.within", self.within, "sde.steps or more")
        require(self.shift_every >= 1, "sde.shift_every", self.shift_every, "1 or more")
        alone = self.window == "branch" and self.steps == 1
        accepted = "False, or sde.window branch with sde.steps 1"
        require(alone or not self.shared_anchor, "sde.shared_anchor", self.shared_anchor, accepted)
        accepted = "1, or with sde.window branch and sde.steps 1 up to sde.within, which has to be given"
        spread = alone and self.within is not None and 1 <= self.branches <= self.within
        require(self.branches == 1 or spread, "sde.branches", self.branches, accepted)
        require(0 < self.trained_share <= 1, "sde.trained_share", self.trained_share, "a number in (0, 1]")
        require(self.epochs >= 1, "sde.epochs", self.epochs, "1 or more")


@dataclass
class DrawConfig:
    """How (t, noise) pairs of the forward process are drawn for the images of a rollout.

    Args:
        per_image: pairs drawn for each image.
        noise: "per_image" (fresh for every image) or "shared_in_group" (all images of a prompt get the same pairs,
            so that what their advantages, which sum to zero, have in common cancels).
        timesteps: "uniform", "stratified" (one in each of `per_image` equal parts of (0, 1]) or "sampler_grid" (a
            random choice of the rollout's own timesteps, as in DiffusionNFT's code).
        shift: a uniform or stratified t becomes shift t / (1 + (shift - 1) t), Stable Diffusion 3's timestep shift
            (arXiv 2403.03206, eq. 23): above 1, more of the pairs are noisy ones.
        guidance: scale of classifier-free guidance of the velocities that are learnt from, 1 being none: the policy is
            then trained to draw well without (DiffusionNFT).
        split: what each of several optimiser steps of an iteration takes its share of: "pairs", of every image some, or
            "images", with all pairs of each, drawn anew each iteration (DiffusionNFT's code).
    """

    per_image: int = 4
    noise: Literal["per_image", "shared_in_group"] = "shared_in_group"
    timesteps: Literal["uniform", "stratified", "sampler_grid"] = "stratified"
    shift: float = 1.0
    guidance: float = 1.0
    split: Literal["pairs", "images"] = "pairs"

    def __post_init__(self) -> None:
        require(self.guidance >= 0, "draws.guidance", self.guidance, "zero or a positive number")
        require(self.per_image >= 1, "draws.per_image", self.per_image, "1 or more")
        require(0 < self.shift < math.inf, "draws.shift", self.shift, "a positive number")
        require(
            self.shift == 1 or self.timesteps != "sampler_grid",
            "draws.shift",
            self.shift,
            "1 with draws.timesteps=sampler_grid, which is not shifted",
        )


def require_grid(draws: DrawConfig, sampler_steps: int) -> None:
    """Refuses more pairs an image than a sampler of `sampler_steps` has timesteps to take them from."""
    if draws.timesteps == "sampler_grid" and draws.per_image > sampler_steps:
        raise ValueError(
            f"draws.per_image is {draws.per_image}; with draws.timesteps=sampler_grid at most rollout.steps, "
            f"{sampler_steps}, are accepted"
        )
