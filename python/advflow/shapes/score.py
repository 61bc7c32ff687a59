"""How far an image is what a prompt asks for: a share in [0, 1], which is 1 exactly where nothing is left to ask."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from advflow.shapes.objects import Found, find_objects
from advflow.shapes.request import Item, Relation, Request

_APART = 0.1  # of the image's side: the least distance of "left of"
_SMALL, _LARGE = 0.18, 0.33  # roots of the share of the image that "small" and "large" objects cover
_LARGER = 1.5  # the least ratio of areas of "larger than"
_WITHIN = 0.95  # of its area that has to be inside
_STRAIGHT, _CROOKED = 0.25, 0.75  # how far from a line objects may be, and where that is none, in parts of their extent


@dataclass(frozen=True)
class Score:
    """`partial`: the share of the request that is met, in [0, 1]; `strict`: whether all of it is."""

    partial: float

    @property
    def strict(self) -> bool:
        return self.partial == 1.0


def score_image(image: np.ndarray, request: Request) -> Score:
    """Scores `image`, float [3, H, W] in [0, 1]; a NaN where it has a pixel that is not finite."""
    return score_objects(find_objects(image), request) if np.isfinite(image).all() else Score(math.nan)


def score_objects(found: Sequence[Found], request: Request) -> Score:
    """Every object that is asked for and every further clause counts as one condition.

    An object has half a point for its shape and half for its colour, or the whole for its shape where the colour is
    open. A clause about objects has what they have, times how far it holds: without them it has nothing. The mean over
    conditions is divided by found / wanted where there are more objects than were asked for.
    """
    wanted = [item for item in request.items for _ in range(item.count)]
    if not found:
        return Score(0.0)
    agreement = np.array([[_agreement(item, each) for each in found] for item in wanted])
    rows, columns = linear_sum_assignment(-agreement)
    points = agreement[rows, columns]
    met = float(points.sum()) / len(wanted)
    values = [_size(item, found) for item in request.items if item.size]
    values += [_relation(relation, request.items, found) for relation in request.relations]
    if request.aligned:
        partners = [found[column] for column, point in zip(columns, points, strict=True) if point > 0]
        values.append(met * _alignment(request.aligned, partners))
    values += [met * all(_agreement(item, each) < 1 for each in found) for item in request.absent]
    share = (float(points.sum()) + sum(values)) / (len(wanted) + len(values))
    partial = share / max(1.0, len(found) / len(wanted))
    return Score(1.0 if partial > 1 - 1e-9 else partial)


def _agreement(item: Item, found: Found) -> float:
    same_shape = float(found.shape == item.shape)
    return same_shape if item.color is None else 0.5 * same_shape + 0.5 * (found.color == item.color)


def _size(item: Item, found: Sequence[Found]) -> float:
    def large(each: Found) -> float:
        return (math.sqrt(each.area) - _SMALL) / (_LARGE - _SMALL)

    return max(
        _agreement(item, each) * _clip(large(each) if item.size == "large" else 1 - large(each)) for each in found
    )


def _relation(relation: Relation, items: Sequence[Item], found: Sequence[Found]) -> float:
    """Of the pair of objects that does best."""
    first, second, holds = items[relation.first], items[relation.second], RELATIONS[relation.name]
    pairs = itertools.permutations(found, 2)
    return max((_agreement(first, a) * _agreement(second, b) * _clip(holds(a, b)) for a, b in pairs), default=0.0)


def _along(along: float, across: float) -> float:
    """1 where the distance along an axis is at least that across it, and a tenth of the image."""
    return along / max(abs(across), _APART)


RELATIONS: dict[str, Callable[[Found, Found], float]] = {
    "left of": lambda a, b: _along(b.x - a.x, b.y - a.y),
    "right of": lambda a, b: _along(a.x - b.x, a.y - b.y),
    "above": lambda a, b: _along(b.y - a.y, b.x - a.x),
    "below": lambda a, b: _along(a.y - b.y, a.x - b.x),
    "inside": lambda a, b: a.share_within(b) / _WITHIN if a.area < b.area else 0.0,
    "larger than": lambda a, b: (a.area / b.area - 1) / (_LARGER - 1),
    "smaller than": lambda a, b: (b.area / a.area - 1) / (_LARGER - 1),
}
"""How far each holds: 1 or more is all of it, 0 or less nothing."""


def _alignment(name: str, objects: Sequence[Found]) -> float:
    """How close to a line the middles of three objects or more are."""
    if len(objects) < 3:
        return 0.0
    places = np.array([(each.x, each.y) for each in objects])
    off = places - places.mean(0)
    normal = {"row": (0.0, 1.0), "column": (1.0, 0.0)}.get(name)
    across = off @ np.array(normal) if normal else off @ np.linalg.svd(off)[2][1]
    crooked = float(np.ptp(across)) / float(np.mean([each.extent for each in objects]))
    return _clip((_CROOKED - crooked) / (_CROOKED - _STRAIGHT))


def _clip(value: float) -> float:
    return min(max(value, 0.0), 1.0)
