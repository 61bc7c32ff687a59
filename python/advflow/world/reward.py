"""The rule-based reward of the embedded world: detect coloured shapes, compare them with what the prompt asks for.

The detector assigns every pixel to its nearest palette colour, takes connected components per colour, and names each
component's shape by the template it overlaps best. It is written for score, not for gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from advflow.world.scene import BACKGROUND, COLORS, PALETTE, SHAPES, Caption, Wanted, relation_holds

_MIN_AREA = 12  # pixels
_MIN_SIDE = 3  # pixels; the antialiased rim of one colour may resemble another colour, but it is thinner than this
_MIN_OVERLAP = 0.72  # intersection over union with the best template below which a component is no shape at all
_POSITION_MARGIN = 4.0  # pixels
_PALETTE_ARRAY = np.array([BACKGROUND, *PALETTE.values()], dtype=np.float32)


@dataclass(frozen=True)
class Detected:
    """An object found in an image; `shape` is None for a blob that resembles no template."""

    shape: str | None
    color: str
    x: float
    y: float


@dataclass(frozen=True)
class Score:
    """`correct`: the image shows exactly what was asked. `partial`: share of the request that is met, in [0, 1]."""

    correct: bool
    partial: float


def detect(image: np.ndarray) -> list[Detected]:
    """Finds the coloured shapes in `image`, float [3, H, W] in [0, 1]. Non-finite pixels count as background."""
    pixels = np.where(np.isfinite(image), image, 0.93).transpose(1, 2, 0)
    distance = np.square(pixels[:, :, None, :] - _PALETTE_ARRAY).sum(-1)
    nearest = distance.argmin(-1)
    found: list[Detected] = []
    for index, color in enumerate(COLORS, start=1):
        labels, count = ndimage.label(nearest == index)
        if not count:
            continue
        for component, box in enumerate(ndimage.find_objects(labels), start=1):
            mask = labels[box] == component
            if mask.sum() >= _MIN_AREA and min(mask.shape) >= _MIN_SIDE:
                rows, columns = box
                x, y = (columns.start + columns.stop) / 2, (rows.start + rows.stop) / 2
                found.append(Detected(_classify(mask), color, x, y))
    return found


def _classify(mask: np.ndarray) -> str | None:
    overlaps = [np.sum(mask & t) / np.sum(mask | t) for t in _templates(*mask.shape)]
    best = int(np.argmax(overlaps))
    return SHAPES[best] if overlaps[best] >= _MIN_OVERLAP else None


@cache
def _templates(height: int, width: int) -> tuple[np.ndarray, ...]:
    """What each shape, drawn to fill a box of this size, covers by at least half a pixel."""
    scale = 8
    box = (0, 0, width * scale - 1, height * scale - 1)
    masks = []
    for shape in SHAPES:
        canvas = Image.new("L", (width * scale, height * scale), 0)
        draw = ImageDraw.Draw(canvas)
        if shape == "circle":
            draw.ellipse(box, fill=255)
        elif shape == "square":
            draw.rectangle(box, fill=255)
        else:
            draw.polygon(((0, box[3]), (box[2], box[3]), (box[2] / 2, 0)), fill=255)
        masks.append(np.asarray(canvas.resize((width, height), Image.Resampling.BOX)) >= 128)
    return tuple(masks)


def score(image: np.ndarray, prompt: Caption) -> Score:
    """Scores one image, float [3, H, W] in [0, 1], against its prompt.

    Correct means: the wanted objects and nothing else, in the wanted colours, number and arrangement. The partial
    score gives each wanted object half a point for its shape and half for its colour (or a whole point for the shape
    where the colour is open), averages, multiplies by wanted/found where there are too many objects, and for a
    position prompt counts the relation as much as one object.
    """
    found = detect(image)
    points, pairs = _match(prompt.wanted, found)
    conditions = float(len(prompt.wanted))
    if prompt.relation is not None:
        conditions += 1.0
        points += float(_relation_met(prompt.relation, pairs))
    surplus = max(len(found) / len(prompt.wanted), 1.0)
    partial = points / conditions / surplus
    return Score(correct=partial >= 1.0, partial=partial)


def score_batch(images: np.ndarray, prompts: list[Caption]) -> list[Score]:
    """Scores `images`, float [B, 3, H, W] in [0, 1], each against the prompt at the same place."""
    return [score(image, prompt) for image, prompt in zip(images, prompts, strict=True)]


def _match(wanted: tuple[Wanted, ...], found: list[Detected]) -> tuple[float, list[Detected | None]]:
    """Assigns found objects to wanted ones, best agreement first. Returns the points and the partner of each."""
    agreement = [[_agreement(w, f) for f in found] for w in wanted]
    partners: list[Detected | None] = [None] * len(wanted)
    points = 0.0
    taken: set[int] = set()
    ranked = sorted(
        ((agreement[i][j], i, j) for i in range(len(wanted)) for j in range(len(found))), key=lambda r: (-r[0], r[1:])
    )
    for value, i, j in ranked:
        if value > 0 and partners[i] is None and j not in taken:
            partners[i] = found[j]
            taken.add(j)
            points += value
    return points, partners


def _agreement(wanted: Wanted, found: Detected) -> float:
    same_shape = float(found.shape == wanted.shape)
    return same_shape if wanted.color is None else 0.5 * same_shape + 0.5 * float(found.color == wanted.color)


def _relation_met(relation: str, partners: list[Detected | None]) -> bool:
    first, second = partners
    if first is None or second is None:
        return False
    return relation_holds(relation, (first.x, first.y), (second.x, second.y), _POSITION_MARGIN)
