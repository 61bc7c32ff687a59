"""How long and on how much the embedded world's base is pretrained."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PretrainSettings:
    """How long and on how much the base is trained. The shipped pipeline used the defaults.

    Like a large model, the base first learns from many captions that are wrong and is then tuned on better ones.

    Args:
        scenes: rendered images.
        vae_steps: steps of the autoencoder.
        vae_lr: its highest learning rate.
        flow_steps: steps on badly captioned images.
        flow_lr: their highest learning rate.
        caption_noise: share of those images that carry another image's caption.
        tune_steps: steps on better captioned images.
        tune_lr: their highest learning rate.
        tune_noise: share of those that carry another image's caption.
        batch: images in a step.
        seed: seed of everything.
    """

    scenes: int = 40_000
    vae_steps: int = 2_500
    vae_lr: float = 2e-3
    flow_steps: int = 7_000
    flow_lr: float = 1.5e-3
    caption_noise: float = 0.35
    tune_steps: int = 600
    tune_lr: float = 4e-4
    tune_noise: float = 0.08
    batch: int = 64
    seed: int = 0
