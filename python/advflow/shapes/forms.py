"""The shapes: how each is drawn, and how it is told from the others.

Whitening a filled outline - moving its pixels to mean 0 and covariance 1 - makes every triangle the same triangle and
every rectangle the same square, however large, tilted or stretched. What is left is the distance from the middle to the
outline in every direction, which is compared with that of each form at the turn where they agree best.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle", "star", "rectangle", "oval")
STRETCH = {"rectangle": 0.55, "oval": 0.6}
"""The short side of what is drawn in parts of its long one."""

_LEAST_ASPECT = 0.8  # of a circle and a square; below it they are an oval and a rectangle
_LEAST_FILL = 0.78  # of a rectangle's own box, which a rhombus fills by half
# The root mean square distance of outlines, in parts of the mean radius, beyond which it is no form. A circle and a
# square are 0.11 apart; from a circle a hexagon has 0.045 and a pentagon 0.065, from a triangle a heart 0.12.
_TOLERANCES = {"circle": 0.058, "square": 0.085, "triangle": 0.1, "star": 0.13}
_STARS = ((5, 0.38), (5, 0.5), (5, 0.62), (4, 0.4), (6, 0.55))  # points, and the inner radius in parts of the outer
_DIRECTIONS = 96
_RADII = np.arange(0.02, 4.4, 0.04)  # in standard deviations; the tip of a slim star is at 3.9
_ANGLES = np.arange(_DIRECTIONS) * (2 * math.pi / _DIRECTIONS)


def outline(shape: str) -> np.ndarray:
    """The corners [N, 2] of `shape` around the origin, its farthest point at distance 1; y grows downwards."""
    if shape in ("circle", "oval"):
        return _ring(128) * (1.0, STRETCH.get(shape, 1.0))
    if shape in ("square", "rectangle"):
        width, height = 1.0, STRETCH.get(shape, 1.0)
        corners = np.array([(-width, -height), (width, -height), (width, height), (-width, height)])
        return corners / math.hypot(width, height)
    return _ring(3, -math.pi / 2) if shape == "triangle" else _star(*_STARS[0])


def name_shape(mask: np.ndarray) -> str | None:
    """The shape that fills `mask`, bool [H, W] without holes; None where it resembles none of them."""
    rows, columns = np.nonzero(mask)
    middle = np.array([columns.mean(), rows.mean()])
    covariance = np.cov(columns, rows, bias=True) + np.eye(2) / 12  # a pixel is a square, not a point
    variances, axes = np.linalg.eigh(covariance)
    radii = _radii(mask, middle, axes * np.sqrt(variances) @ axes.T)
    distance, family = min((_distance(radii, form), name) for name, form in _forms())
    if distance > _TOLERANCES[family]:
        return None
    if family in ("triangle", "star"):
        return family
    aspect = math.sqrt(variances[0] / variances[1])
    if family == "circle":
        return "circle" if aspect >= _LEAST_ASPECT else "oval"
    if aspect >= _LEAST_ASPECT:
        return "square"
    extents = np.ptp(np.stack([columns, rows], 1) @ axes, axis=0) + 1
    return "rectangle" if len(rows) / extents.prod() >= _LEAST_FILL else None


def _radii(mask: np.ndarray, middle: np.ndarray, root: np.ndarray) -> np.ndarray:
    """How far the outline is from the middle in each whitened direction, as the covered part of a ray."""
    directions = np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], 1) @ root
    points = np.rint(middle + _RADII[:, None, None] * directions).astype(int)
    columns, rows = points[..., 0], points[..., 1]
    height, width = mask.shape
    inside = (columns >= 0) & (columns < width) & (rows >= 0) & (rows < height)
    covered = mask[rows.clip(0, height - 1), columns.clip(0, width - 1)] & inside
    return np.asarray(covered.sum(0) * (_RADII[1] - _RADII[0]))


def _distance(radii: np.ndarray, form: np.ndarray) -> float:
    """Root mean square difference at the turn where it is least, in parts of the mean radius."""
    together = np.fft.irfft(np.fft.rfft(radii) * np.conj(np.fft.rfft(form)), len(radii)).max()
    squared = (np.square(radii).sum() + np.square(form).sum() - 2 * together) / len(radii)
    return math.sqrt(max(squared, 0.0)) / float(radii.mean())


@cache
def _forms() -> tuple[tuple[str, np.ndarray], ...]:
    """The families that whitening leaves, each with its radii."""
    outlines = [(name, outline(name)) for name in ("circle", "square", "triangle")]
    outlines += [("star", _star(*star)) for star in _STARS]
    return tuple((name, _radii_of_outline(corners)) for name, corners in outlines)


def _radii_of_outline(corners: np.ndarray) -> np.ndarray:
    side = 512
    canvas = Image.new("1", (side, side))
    ImageDraw.Draw(canvas).polygon([tuple(corner) for corner in side / 2 + corners * side * 0.48], fill=1)
    mask = np.asarray(canvas)
    rows, columns = np.nonzero(mask)
    variances, axes = np.linalg.eigh(np.cov(columns, rows, bias=True))
    return _radii(mask, np.array([columns.mean(), rows.mean()]), axes * np.sqrt(variances) @ axes.T)


def _ring(count: int, start: float = 0.0) -> np.ndarray:
    angles = start + np.arange(count) * (2 * math.pi / count)
    return np.stack([np.cos(angles), np.sin(angles)], 1)


def _star(points: int, inner: float) -> np.ndarray:
    return _ring(2 * points, -math.pi / 2) * np.where(np.arange(2 * points) % 2, inner, 1.0)[:, None]
