"""How long and on how much the embedded world's base is pretrained."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PretrainSettings:
    """How long and on how much the base is trained. The shipped pipeline used the defaults."""

    scenes: int = 40_000
    vae_steps: int = 2_500
    vae_lr: float = 2e-3
    flow_steps: int = 3_000
    flow_lr: float = 1.5e-3
    caption_noise: float = 0.35
    batch: int = 64
    seed: int = 0
