"""HPSv2.1 (tgxs002/HPSv2): a CLIP model of open_clip tuned on human preferences."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.nn import functional

from advflow.data.prompt import Prompt
from advflow.rewards import Scores
from advflow.rewards.loading import (
    lacking_file,
    lacking_package,
    load_into,
    needed,
    read_weights,
    scoring_device,
)


class HPSv2:
    """cos(image, text), as in DiffusionNFT and HPSv2's own code.

    Images are resized as there, bicubic to the model's size and padded with black where they are no squares, and are
    not rounded to 8 bits.

    Args:
        checkpoint: file of the weights, HPS_v2.1_compressed.pt or the same as .safetensors.
        architecture: open_clip's name of the model.

    Raises WrongArgument where the weights cannot be loaded, ValueError where open_clip is not installed.
    """

    batch = 32

    def __init__(self, checkpoint: str, architecture: str = "ViT-H-14") -> None:
        weights = read_weights("checkpoint", checkpoint)
        open_clip = needed("open_clip", "the reward 'hpsv2'", "hpsv2")
        self._device = scoring_device()
        self._model = open_clip.create_model(architecture, output_dict=True).eval().requires_grad_(False)
        load_into(self._model, weights, "checkpoint", checkpoint)
        self._model.to(self._device)
        self._tokenizer = open_clip.get_tokenizer(architecture)
        size = self._model.visual.image_size
        self._size = size if isinstance(size, int) else size[0]
        mean, std = self._model.visual.image_mean, self._model.visual.image_std
        self._mean, self._std = (torch.tensor(each, device=self._device).view(3, 1, 1) for each in (mean, std))

    @staticmethod
    def lacking(checkpoint: str, architecture: str = "ViT-H-14") -> list[ValueError]:
        source = f"hf download xswu/HPSv2 HPS_v2.1_compressed.pt --local-dir {Path(checkpoint).parent}"
        package = lacking_package("open_clip", "the reward 'hpsv2'", "hpsv2")
        return lacking_file("checkpoint", checkpoint, source) + package

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, prompts: list[Prompt]) -> Scores:
        pixels = (fitted(images.to(self._device), self._size) - self._mean) / self._std
        tokens = self._tokenizer([prompt.text for prompt in prompts]).to(self._device)
        features = self._model(pixels, tokens)
        score = (features["image_features"] * features["text_features"]).sum(-1).float().cpu()
        return Scores(reward=score, score=score)


def fitted(images: torch.Tensor, size: int) -> torch.Tensor:
    """Images [B, 3, H, W] resized so that the longer side is `size`, in the middle of black [B, 3, size, size]."""
    height, width = images.shape[-2:]
    scale = size / max(height, width)
    if scale != 1:
        height, width = round(height * scale), round(width * scale)
        images = functional.interpolate(images, (height, width), mode="bicubic", align_corners=False, antialias=True)
    left, top = (size - width) // 2, (size - height) // 2
    return functional.pad(images, (left, size - width - left, top, size - height - top))
