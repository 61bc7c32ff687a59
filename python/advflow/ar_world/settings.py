"""The shape of the embedded world's tokenizer and transformer, and how long and on how much they are pretrained."""

from __future__ import annotations

from dataclasses import dataclass

from advflow.ar_world import texts
from advflow.autoregressive.llamagen import GPTConfig
from advflow.autoregressive.vq import VQConfig
from advflow.settings.numbers import require_numbers
from advflow.world.scene import IMAGE_SIZE

TOKENIZER = VQConfig(codes=512, code_width=8, channels=8, multipliers=(1, 2, 4), blocks=1, latent_channels=32, groups=4)
TRANSFORMER = GPTConfig(
    layers=4,
    heads=4,
    width=128,
    tokens=(IMAGE_SIZE // TOKENIZER.downsampling) ** 2,
    vocabulary=TOKENIZER.codes,
    condition="text",
    text_tokens=texts.PLACES,
    text_width=texts.WIDTH,
    multiple=64,
)


@dataclass(frozen=True)
class ARPretrainSettings:
    """How long and on how much the base is trained. The shipped weights are those of the defaults.

    Args:
        tokenizer_scenes: rendered images of all categories, for the tokenizer.
        scenes: rendered images of this world's categories, for the transformer.
        tokenizer_steps: steps of the tokenizer.
        tokenizer_lr: its highest learning rate.
        tokenizer_batch: images in its steps.
        steps: steps of the transformer.
        lr: its highest learning rate.
        batch: images in its steps.
        caption_noise: share of the images that carry another image's caption: what guidance and rewards can take back.
        caption_dropout: share of the images that carry none, which guidance needs.
        seed: seed of everything.
    """

    tokenizer_scenes: int = 20_000
    scenes: int = 30_000
    tokenizer_steps: int = 1_500
    tokenizer_lr: float = 3e-3
    tokenizer_batch: int = 32
    steps: int = 1_800
    lr: float = 3e-3
    batch: int = 32
    caption_noise: float = 0.1
    caption_dropout: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        require_numbers(self)
        for name in ("tokenizer_scenes", "scenes", "tokenizer_steps", "tokenizer_batch", "steps", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; accepted: 1 or more")
        for name in ("tokenizer_lr", "lr"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; accepted: a positive number")
        for name in ("caption_noise", "caption_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; accepted: a number in [0, 1]")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; accepted: zero or a positive integer")
