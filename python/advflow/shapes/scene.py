"""Scenes that show what was asked for, drawn: what the rule is tested on, and what the page about it shows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from advflow.shapes.colors import COLORS, PALETTE
from advflow.shapes.forms import outline
from advflow.shapes.request import Relation, Request

SIDE = 512
_WHITE = (0.97, 0.97, 0.96)
_SUPERSAMPLE = 2
_GAP = 0.03  # kept free between two shapes and at the rim, so that they never merge
_TILT = math.radians(14)
_TRIES = 200

# Roots of the share of the image that a shape covers.
_SIZES = {1: (0.2, 0.36), 2: (0.15, 0.24), 3: (0.12, 0.18)}
_SIZE_OF_MANY = (0.1, 0.15)
_NAMED = {"large": (0.36, 0.42), "small": (0.09, 0.15)}
_OUTER = (0.38, 0.45)


@dataclass(frozen=True)
class Drawn:
    """A shape in a scene: its middle and the root of its area in parts of the image's side, its turn in radians."""

    shape: str
    color: str
    x: float
    y: float
    size: float
    turn: float = 0.0

    @property
    def corners(self) -> np.ndarray:
        cos, sin = math.cos(self.turn), math.sin(self.turn)
        return np.asarray(self.radius * outline(self.shape) @ np.array([[cos, sin], [-sin, cos]]) + (self.x, self.y))

    @property
    def radius(self) -> float:
        """Of the circle around it."""
        return self.size / math.sqrt(_unit_area(self.shape))

    @property
    def inner_radius(self) -> float:
        """Of a circle within it."""
        starts = outline(self.shape)
        middles = (starts + np.roll(starts, -1, 0)) / 2
        return self.radius * float(np.hypot(*np.concatenate([starts, middles]).T).min()) * 0.97


def _unit_area(shape: str) -> float:
    x, y = outline(shape).T
    return abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1))) / 2


def sample_scene(request: Request, rng: np.random.Generator) -> list[Drawn]:
    """Draws a scene that shows `request` and nothing else, at random places."""
    while True:
        scene = _place_aligned(request, rng) if request.aligned else _place(request, rng)
        if scene is not None:
            return scene


def _place(request: Request, rng: np.random.Generator) -> list[Drawn] | None:
    scene: list[Drawn] = []
    for shape, color, size in _sizes(request, rng):
        for _ in range(_TRIES):
            radius = Drawn(shape, color, 0, 0, size).radius
            x, y = rng.uniform(radius + _GAP, 1 - radius - _GAP, 2)
            one = Drawn(shape, color, float(x), float(y), size, rng.uniform(-_TILT, _TILT))
            if all(math.hypot(one.x - o.x, one.y - o.y) > one.radius + o.radius + _GAP for o in scene):
                break
        else:
            return None
        scene.append(one)
    for relation in request.relations:
        if relation.name == "inside":
            inner, outer = scene[relation.first], scene[relation.second]
            scene[relation.first] = _move_inside(inner, outer, rng)
        elif not _holds(relation, scene):
            return None
    return scene


def _sizes(request: Request, rng: np.random.Generator) -> list[tuple[str, str, float]]:
    """The shape, colour and size of every object, in the order of the request's items."""
    usual = _SIZES.get(request.count, _SIZE_OF_MANY)
    sizes = [rng.uniform(*_NAMED.get(item.size or "", usual)) for item in request.items for _ in range(item.count)]
    for relation in request.relations:
        if relation.name == "inside":
            sizes[relation.first], sizes[relation.second] = 0.1, rng.uniform(*_OUTER)
        elif relation.name in ("larger than", "smaller than"):
            large, small = relation.first, relation.second
            if relation.name == "smaller than":
                large, small = small, large
            sizes[small] = rng.uniform(0.12, 0.16)
            sizes[large] = sizes[small] * rng.uniform(1.5, 1.9)
    kinds = [(item.shape, item.color) for item in request.items for _ in range(item.count)]
    return [
        (shape, color or COLORS[rng.integers(len(COLORS))], float(size))
        for (shape, color), size in zip(kinds, sizes, strict=True)
    ]


def _move_inside(inner: Drawn, outer: Drawn, rng: np.random.Generator) -> Drawn:
    room = outer.inner_radius
    size = float(rng.uniform(0.6, 0.75)) * room * math.sqrt(_unit_area(inner.shape))
    x, y = (float(rng.uniform(-0.1, 0.1)) * room for _ in range(2))
    return Drawn(inner.shape, inner.color, outer.x + x, outer.y + y, size, inner.turn)


def _holds(relation: Relation, scene: Sequence[Drawn]) -> bool:
    first, second = scene[relation.first], scene[relation.second]
    dx, dy = second.x - first.x, second.y - first.y
    axes = {"left of": (dx, dy), "right of": (-dx, dy), "above": (dy, dx), "below": (-dy, dx)}
    if relation.name not in axes:
        return True  # of sizes, which were chosen so
    along, across = axes[relation.name]
    return along > 1.3 * abs(across) and along > 0.15


def _place_aligned(request: Request, rng: np.random.Generator) -> list[Drawn] | None:
    turn = {"row": 0.0, "column": math.pi / 2}.get(request.aligned or "", float(rng.uniform(0, math.pi)))
    step = 0.84 / request.count
    middle = rng.uniform(0.3, 0.7) if request.aligned in ("row", "column") else 0.5
    scene = []
    for number, (shape, color, _) in enumerate(_sizes(request, rng)):
        along, across = (number - (request.count - 1) / 2) * step, float(rng.uniform(-0.04, 0.04)) * step
        size = 0.44 * step * math.sqrt(_unit_area(shape))
        x = along * math.cos(turn) - across * math.sin(turn) + (middle if request.aligned == "column" else 0.5)
        y = along * math.sin(turn) + across * math.cos(turn) + (middle if request.aligned == "row" else 0.5)
        scene.append(Drawn(shape, color, x, y, size, rng.uniform(-_TILT, _TILT)))
    return scene


def render(scene: Sequence[Drawn], background: tuple[float, float, float] = _WHITE, side: int = SIDE) -> np.ndarray:
    """Draws a scene, antialiased, the largest shapes first. Returns float32 [3, side, side] in [0, 1]."""
    scale = side * _SUPERSAMPLE
    canvas = Image.new("RGB", (scale, scale), _rgb8(background))
    draw = ImageDraw.Draw(canvas)
    for each in sorted(scene, key=lambda one: -one.size):
        draw.polygon([tuple(corner) for corner in each.corners * scale], fill=_rgb8(PALETTE[each.color]))
    small = canvas.resize((side, side), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float32).transpose(2, 0, 1) / 255


def _rgb8(color: tuple[float, float, float]) -> tuple[int, int, int]:
    red, green, blue = (round(255 * channel) for channel in color)
    return red, green, blue
