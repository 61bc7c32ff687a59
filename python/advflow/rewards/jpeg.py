"""The size of an image as a JPEG file (DDPO, arXiv 2305.13301): a dense reward that needs no model."""

from __future__ import annotations

import io

import torch
from PIL import Image

from advflow.data.prompt import Prompt
from advflow.rewards import Scores
from advflow.rewards.images import pictures

_QUALITY = 95


class Incompressibility:
    """Size in kB, 1,000 bytes, of the 8-bit image as a JPEG file of quality 95, as in DDPO's code and flow_grpo's."""

    _sign = 1.0

    def __call__(self, images: torch.Tensor, prompts: list[Prompt]) -> Scores:
        sizes = torch.tensor([self._sign * _kilobytes(picture) for picture in pictures(images)])
        return Scores(reward=sizes, score=sizes)


class Compressibility(Incompressibility):
    """The negative of that size, as in DDPO's code; flow_grpo divides it by 500."""

    _sign = -1.0


def _kilobytes(picture: Image.Image) -> float:
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=_QUALITY)
    return buffer.tell() / 1000
