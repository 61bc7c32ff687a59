"""Images as rewards see them that were made for files: 8 bits a channel."""

from __future__ import annotations

import torch
from PIL import Image


def eight_bit(images: torch.Tensor) -> torch.Tensor:
    """uint8 [B, 3, H, W] on the CPU of images in [0, 1], rounded."""
    return (images * 255).round().clamp(0, 255).to("cpu", torch.uint8)


def pictures(images: torch.Tensor) -> list[Image.Image]:
    """The same as pictures."""
    return [Image.fromarray(each) for each in eight_bit(images).permute(0, 2, 3, 1).contiguous().numpy()]
