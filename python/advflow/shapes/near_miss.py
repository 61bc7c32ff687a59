"""Requests that differ in one thing from another: a scene of one should score less than full for the other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from advflow.shapes.colors import COLORS
from advflow.shapes.forms import SHAPES
from advflow.shapes.request import MOST, SIZES, Item, Relation, Request


def near_misses(request: Request) -> dict[str, Request]:
    """What could be drawn instead of `request`, by what is wrong with it."""
    return dict(_changes(request))


def _changes(request: Request) -> Iterator[tuple[str, Request]]:
    first, *others = request.items
    named = (*request.items, *request.absent)
    shape = _other(SHAPES, [item.shape for item in named], after=first.shape)
    yield "another shape", _with_first(request, replace(first, shape=shape))
    if first.color:
        color = _other(COLORS, [item.color for item in named], after=first.color)
        yield "another colour", _with_first(request, replace(first, color=color))
    if request.count < MOST and not request.relations and not first.size:
        yield "one too many", _with_first(request, replace(first, count=first.count + 1))
    if first.count > 1:
        yield "one missing", _with_first(request, replace(first, count=first.count - 1))
    if first.size:
        yield "the other size", _with_first(request, replace(first, size=SIZES[1 - SIZES.index(first.size)]))
    if others and first.color:
        second = others[0]
        items = (replace(first, color=second.color), replace(second, color=first.color))
        yield "colours exchanged", replace(request, items=items)
    if request.relations:
        turned = tuple(Relation(each.name, each.second, each.first) for each in request.relations)
        yield "the other way round", replace(request, relations=turned)
    if request.aligned in ("row", "column"):
        yield "the other direction", replace(request, aligned="column" if request.aligned == "row" else "row")
    if request.absent:
        yield "not left out", replace(request, items=(*request.items, *request.absent), absent=())


def _with_first(request: Request, item: Item) -> Request:
    return replace(request, items=(item, *request.items[1:]))


def _other(names: tuple[str, ...], taken: list[str | None], after: str) -> str:
    start = names.index(after)
    return next(name for name in names[start:] + names[:start] if name not in taken)
