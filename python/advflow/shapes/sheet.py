"""A page of scenes with what was asked for and the score: what the rule is content with, and what it is not."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from advflow.shapes.near_miss import near_misses
from advflow.shapes.perturb import PERTURBATIONS
from advflow.shapes.prompts import CATEGORIES, ShapesPrompt, training_prompts
from advflow.shapes.scene import render, sample_scene
from advflow.shapes.score import score_image

_TILE, _TEXT = 168, 40
_COLUMNS = 6
_INK = {True: (20, 110, 50), False: (170, 40, 30)}


def draw_sheet(seed: int = 0) -> Image.Image:
    """A scene of each category as asked for, and one with something wrong, each perturbation in turn."""
    rng = np.random.default_rng(seed)
    ways = [("", lambda image, rng: image), *PERTURBATIONS.items()]
    tiles: list[Image.Image] = []
    for number, category in enumerate(CATEGORIES):
        prompt = _example(category, rng)
        wrong = list(near_misses(prompt.request).items())
        for said, request in (("", prompt.request), wrong[(number + 1) % len(wrong)]):
            way, perturb = ways[len(tiles) % len(ways)]
            image = perturb(render(sample_scene(request, rng)), rng)
            tiles.append(_tile(image, prompt, ", ".join(filter(None, (said, way)))))
    rows = -(-len(tiles) // _COLUMNS)
    sheet = Image.new("RGB", (_COLUMNS * _TILE, rows * (_TILE + _TEXT)), "white")
    for number, tile in enumerate(tiles):
        sheet.paste(tile, (number % _COLUMNS * _TILE, number // _COLUMNS * (_TILE + _TEXT)))
    return sheet


def _example(category: str, rng: np.random.Generator) -> ShapesPrompt:
    of_category = [prompt for prompt in training_prompts() if prompt.category == category]
    return of_category[rng.integers(len(of_category))]


def _tile(image: np.ndarray, prompt: ShapesPrompt, remark: str) -> Image.Image:
    score = score_image(image, prompt.request)
    tile = Image.new("RGB", (_TILE, _TILE + _TEXT), "white")
    pixels = Image.fromarray((image * 255).round().astype(np.uint8).transpose(1, 2, 0))
    tile.paste(pixels.resize((_TILE - 8, _TILE - 8), Image.Resampling.LANCZOS), (4, 4))
    draw, font = ImageDraw.Draw(tile), ImageFont.load_default(10)
    lines = [""]
    for word in prompt.body.split():
        line = f"{lines[-1]} {word}".strip()
        lines[-1:] = [line] if draw.textlength(line, font) < _TILE - 8 else [lines[-1], word]
    draw.multiline_text((4, _TILE - 3), "\n".join(lines), (40, 40, 40), font, spacing=1)
    said = f"{score.partial:.2f}" + (f"  {remark}" if remark else "")
    draw.text((4, _TILE + _TEXT - 13), said, _INK[score.strict], font)
    return tile
