"""How long and on how much the embedded world's base is pretrained."""

from __future__ import annotations

from dataclasses import dataclass

from advflow.settings.numbers import require_numbers


@dataclass(frozen=True)
class FlowStage:
    """One stage of flow matching, with a learning rate that rises to `lr` and falls to zero.

    Args:
        steps: optimiser steps.
        lr: highest learning rate.
        caption_noise: share of the images that carry another image's caption.
    """

    steps: int
    lr: float
    caption_noise: float

    def __post_init__(self) -> None:
        require_numbers(self, "flow_stages.")
        if self.steps < 1:
            raise ValueError(f"flow_stages.steps is {self.steps}; accepted: 1 or more")
        if self.lr <= 0:
            raise ValueError(f"flow_stages.lr is {self.lr}; accepted: a positive number")
        if not 0 <= self.caption_noise <= 1:
            raise ValueError(f"flow_stages.caption_noise is {self.caption_noise}; accepted: a number in [0, 1]")


@dataclass(frozen=True)
class PretrainSettings:
    """How long and on how much the base is trained. The shipped pipeline used the defaults.

    Args:
        scenes: rendered images.
        vae_steps: steps of the autoencoder.
        vae_lr: its highest learning rate.
        flow_stages: stages of flow matching, in order. Wrong captions leave the model able to draw more than it shows.
        batch: images in a step.
        seed: seed of everything.
    """

    scenes: int = 40_000
    vae_steps: int = 2_500
    vae_lr: float = 2e-3
    flow_stages: tuple[FlowStage, ...] = (
        FlowStage(3_000, 1.5e-3, 0.0),
        FlowStage(1_500, 1e-3, 0.15),
        FlowStage(150, 3e-4, 0.10),
    )
    batch: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        require_numbers(self)
        for name in ("scenes", "vae_steps", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; accepted: 1 or more")
        if self.vae_lr <= 0:
            raise ValueError(f"vae_lr is {self.vae_lr}; accepted: a positive number")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; accepted: zero or a positive integer")
