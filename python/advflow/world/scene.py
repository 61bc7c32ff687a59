"""Scenes of the embedded world: captioned coloured shapes on a light background.

A scene is a short list of shapes; its caption is one of six kinds, the six categories of GenEval. Pixels lie in
[0, 1]; coordinates are pixels with the origin at the top left.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

IMAGE_SIZE = 32
SHAPES = ("circle", "square", "triangle")
PALETTE = {
    "red": (0.86, 0.16, 0.16),
    "green": (0.14, 0.62, 0.22),
    "blue": (0.16, 0.30, 0.88),
    "yellow": (0.96, 0.80, 0.10),
}
COLORS = tuple(PALETTE)
BACKGROUND = (0.93, 0.93, 0.93)
RELATIONS = ("left of", "right of", "above", "below")
CATEGORIES: tuple[Category, ...] = (
    "single_object",
    "two_objects",
    "counting",
    "colors",
    "position",
    "color_attribution",
)
COUNT_WORDS = {2: "two", 3: "three"}
PREFIXES = ("", "a photo of ", "a picture of ", "a drawing of ")

Category = Literal["single_object", "two_objects", "counting", "colors", "position", "color_attribution"]
_SUPERSAMPLE = 4
_GAP = 2.0  # pixels kept free between two shapes, so that they never merge into one


@dataclass(frozen=True)
class Wanted:
    """One object a prompt asks for; `color` is None where the prompt leaves it open."""

    shape: str
    color: str | None = None

    def __str__(self) -> str:
        return self.shape if self.color is None else f"{self.color} {self.shape}"


@dataclass(frozen=True)
class Caption:
    """A text together with what it asks for. `relation` places the first object with respect to the second."""

    text: str
    category: Category
    wanted: tuple[Wanted, ...]
    relation: str | None = None


@dataclass(frozen=True)
class Placed:
    """A shape in an image: centre (x, y) and half extent `radius`, all in pixels."""

    shape: str
    color: str
    x: float
    y: float
    radius: float


def all_captions() -> list[Caption]:
    """Every caption of the world, in a fixed order."""
    bodies: list[Caption] = []
    for shape in SHAPES:
        bodies.append(Caption(f"a {shape}", "single_object", (Wanted(shape),)))
        for count, word in COUNT_WORDS.items():
            bodies.append(Caption(f"{word} {shape}s", "counting", (Wanted(shape),) * count))
        for color in COLORS:
            bodies.append(Caption(f"a {color} {shape}", "colors", (Wanted(shape, color),)))
        for other in SHAPES:
            if other == shape:
                continue
            pair = (Wanted(shape), Wanted(other))
            bodies.append(Caption(f"a {shape} and a {other}", "two_objects", pair))
            bodies += [Caption(f"a {shape} {rel} a {other}", "position", pair, rel) for rel in RELATIONS]
            for color in COLORS:
                for other_color in COLORS:
                    if other_color != color:
                        colored = (Wanted(shape, color), Wanted(other, other_color))
                        text = f"a {colored[0]} and a {colored[1]}"
                        bodies.append(Caption(text, "color_attribution", colored))
    return [replace(body, text=prefix + body.text) for body in bodies for prefix in PREFIXES]


def relation_holds(relation: str, first: tuple[float, float], second: tuple[float, float], margin: float) -> bool:
    """Whether `first` lies `relation` of `second`: along that axis by at least `margin` px and by more than across."""
    dx, dy = second[0] - first[0], second[1] - first[1]
    along, across = {"left of": (dx, dy), "right of": (-dx, dy), "above": (dy, dx), "below": (-dy, dx)}[relation]
    return along >= margin and along >= abs(across)


def sample_scene(prompt: Caption, rng: np.random.Generator) -> list[Placed]:
    """Draws a scene that the prompt describes: exactly the wanted objects, at random free places."""
    while True:
        scene = _try_place(prompt, rng)
        if scene is not None:
            return scene


def _try_place(prompt: Caption, rng: np.random.Generator) -> list[Placed] | None:
    largest = 8.0 if len(prompt.wanted) == 1 else 6.5
    scene: list[Placed] = []
    for wanted in prompt.wanted:
        radius = rng.uniform(4.5, largest)
        x, y = rng.uniform(radius + 1, IMAGE_SIZE - radius - 1, size=2)
        color = wanted.color or COLORS[rng.integers(len(COLORS))]
        if any(max(abs(x - o.x), abs(y - o.y)) < radius + o.radius + _GAP for o in scene):
            return None
        scene.append(Placed(wanted.shape, color, float(x), float(y), float(radius)))
    if prompt.relation is not None:
        first, second = scene
        if not relation_holds(prompt.relation, (first.x, first.y), (second.x, second.y), margin=8.0):
            return None
    return scene


def render(scene: list[Placed]) -> np.ndarray:
    """Draws a scene, antialiased. Returns float32 [3, 32, 32] in [0, 1]."""
    scale = _SUPERSAMPLE
    canvas = Image.new("RGB", (IMAGE_SIZE * scale,) * 2, _rgb8(BACKGROUND))
    draw = ImageDraw.Draw(canvas)
    for placed in scene:
        draw_shape(draw, placed, scale)
    small = canvas.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)
    return (np.asarray(small, dtype=np.float32) / 255.0).transpose(2, 0, 1)


def draw_shape(draw: ImageDraw.ImageDraw, placed: Placed, scale: int) -> None:
    left, top = (placed.x - placed.radius) * scale, (placed.y - placed.radius) * scale
    right, bottom = (placed.x + placed.radius) * scale, (placed.y + placed.radius) * scale
    fill = _rgb8(PALETTE[placed.color])
    if placed.shape == "circle":
        draw.ellipse((left, top, right, bottom), fill=fill)
    elif placed.shape == "square":
        inset = (1 - math.sqrt(math.pi) / 2) * placed.radius * scale  # the same area as the circle
        draw.rectangle((left + inset, top + inset, right - inset, bottom - inset), fill=fill)
    else:
        draw.polygon(((left, bottom), (right, bottom), ((left + right) / 2, top)), fill=fill)


def _rgb8(color: tuple[float, float, float]) -> tuple[int, int, int]:
    red, green, blue = (round(255 * channel) for channel in color)
    return red, green, blue
