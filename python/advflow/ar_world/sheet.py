"""A picture of what the base draws, without guidance on the left and with it on the right.

python -m advflow.ar_world.sheet docs/images/ar-base.png
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from advflow.ar_world.world import World, condition, draw, load

PROMPTS = ("a circle", "a triangle", "a red square", "a blue circle", "a yellow triangle", "a square and a circle")
GUIDANCES = (1.0, 2.0)
_A_ROW, _SCALE, _GAP, _LINE = 6, 2, 4, 14


def sheet(world: World) -> Image.Image:
    """A line of images for each prompt and guidance, from the same random numbers at both."""
    rows = [condition([prompt] * _A_ROW) for prompt in PROMPTS]
    halves = [
        [draw(world.policy, world.tokenizer, told, _generators(), guidance=guidance).images for told in rows]
        for guidance in GUIDANCES
    ]
    side = 32 * _SCALE + _GAP
    width, height = _A_ROW * side, side + _LINE
    canvas = Image.new("RGB", (2 * width + 4 * _GAP, height * len(PROMPTS) + _LINE), "white")
    pen = ImageDraw.Draw(canvas)
    for column, (guidance, half) in enumerate(zip(GUIDANCES, halves, strict=True)):
        left = column * (width + 4 * _GAP)
        pen.text((left, 0), "no guidance" if guidance == 1 else f"guidance {guidance:g}", fill="black")
        for row, (prompt, images) in enumerate(zip(PROMPTS, half, strict=True)):
            top = _LINE + row * height
            pen.text((left, top), prompt, fill=(90, 90, 90))
            for place, image in enumerate(images):
                canvas.paste(_picture(image), (left + place * side, top + _LINE))
    return canvas


def _generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(_A_ROW)]


def _picture(image: Tensor) -> Image.Image:
    pixels = image.mul(255).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(np.repeat(np.repeat(pixels, _SCALE, 0), _SCALE, 1))


if __name__ == "__main__":
    sheet(load()).save(Path(sys.argv[1]))
