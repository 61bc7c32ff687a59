"""The prompts: of eleven categories, a quarter kept for evaluation, each with what it asks for."""

from __future__ import annotations

import itertools
import json
import zlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from advflow.shapes.colors import COLORS
from advflow.shapes.forms import SHAPES
from advflow.shapes.request import ALIGNMENTS, COMPARISONS, MOST, SIZES, Item, Relation, Request, to_metadata

CATEGORIES = (
    "single_object", "two_objects", "counting", "colors", "position", "color_attribution",  # GenEval's
    "size", "relative_size", "containment", "alignment", "absence",
)  # fmt: skip
STYLES = (
    "{}, flat colours on a white background",
    "a simple vector drawing of {} on a white background",
    "{}, minimalist geometric art, plain light background",
    "a children's book illustration of {}, white background",
    "a photo of {} cut out of coloured paper, on a white table",
)
TRAINING_PER_CATEGORY = 128  # with all categories fewer than the trainer keeps the embeddings of

_HELD_OUT_EVERY = 4
_NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
_DIRECTIONS = ("left of", "right of", "above", "below")
_ALIGNED = {"row": "in a row", "column": "in a column", "line": "in a straight line"}


@dataclass(frozen=True)
class ShapesPrompt:
    """What is asked for, in a category: `body` in words, and those in a `style`."""

    body: str
    style: str
    category: str
    request: Request

    @property
    def text(self) -> str:
        return self.style.format(self.body)

    def to_json(self) -> str:
        """A line of a prompt file."""
        line = {"prompt": self.text, "tag": self.category} | to_metadata(self.request)
        return json.dumps(line, ensure_ascii=False)


@cache
def training_prompts(per_category: int = TRAINING_PER_CATEGORY, seed: int = 0) -> tuple[ShapesPrompt, ...]:
    """Up to `per_category` prompts of each category. None has the objects of a held-out one, in whatever relation."""
    return tuple(_choose(per_category, seed, held_out=False))


@cache
def held_out_prompts(per_category: int, seed: int = 0) -> tuple[ShapesPrompt, ...]:
    """Up to `per_category` prompts of each category for evaluation."""
    return tuple(_choose(per_category, seed, held_out=True))


def _choose(per_category: int, seed: int, held_out: bool) -> Iterator[ShapesPrompt]:
    kept = _held_out_objects()
    pool: dict[str, list[ShapesPrompt]] = defaultdict(list)
    for category, body, request in _everything():
        if (_objects(request) in kept) == held_out:
            pool[category] += [ShapesPrompt(body, style, category, request) for style in STYLES]
    for category in CATEGORIES:
        # Ordered by a checksum rather than a random generator: a seed must mean the same with every library version.
        yield from sorted(pool[category], key=lambda each: zlib.crc32(f"{seed} {each.text}".encode()))[:per_category]


@cache
def _held_out_objects() -> frozenset[tuple[tuple[str, int], ...]]:
    """One set of objects in four, of every number of objects, with and without colours."""
    forms: dict[tuple[tuple[bool, int], ...], set[tuple[tuple[str, int], ...]]] = defaultdict(set)
    for _, _, request in _everything():
        form = sorted((item.color is None, item.count) for item in (*request.items, *request.absent))
        forms[tuple(form)].add(_objects(request))
    ranked = (sorted(sets, key=lambda each: zlib.crc32(repr(each).encode())) for sets in forms.values())
    return frozenset(objects for sets in ranked for objects in sets[::_HELD_OUT_EVERY])


def _objects(request: Request) -> tuple[tuple[str, int], ...]:
    """What is named in a request, wanted or not, whatever its size and place."""
    return tuple(sorted((item.kind, item.count) for item in (*request.items, *request.absent)))


@cache
def _everything() -> tuple[tuple[str, str, Request], ...]:
    """Every category, text without its style, and request."""
    return tuple(itertools.chain(_of_one_kind(), _of_two_kinds()))


def _of_one_kind() -> Iterator[tuple[str, str, Request]]:
    for shape in SHAPES:
        yield "single_object", _a(shape), Request((Item(shape),))
        for count in range(2, MOST + 1):
            yield "counting", f"{_NUMBERS[count]} {shape}s", Request((Item(shape, count=count),))
    for shape, color in itertools.product(SHAPES, COLORS):
        kind = f"{color} {shape}"
        yield "colors", _a(kind), Request((Item(shape, color),))
        for size in SIZES:
            yield "size", f"a {size} {kind}", Request((Item(shape, color, size=size),))
        for count in range(2, MOST + 1):
            request = Request((Item(shape, color, count),))
            yield "counting", f"{_NUMBERS[count]} {kind}s", request
            if 3 <= count <= 5:
                for aligned in ALIGNMENTS:
                    text = f"{_NUMBERS[count]} {kind}s {_ALIGNED[aligned]}"
                    yield "alignment", text, Request(request.items, aligned=aligned)


def _of_two_kinds() -> Iterator[tuple[str, str, Request]]:
    for first, second in itertools.permutations(SHAPES, 2):
        yield "two_objects", f"{_a(first)} and {_a(second)}", Request((Item(first), Item(second)))
        for one, other in itertools.permutations(COLORS, 2):
            items = (Item(first, one), Item(second, other))
            a, b = (_a(item.kind) for item in items)
            yield "color_attribution", f"{a} and {b}", Request(items)
            for name in _DIRECTIONS:
                yield "position", f"{a} {name} {b}", Request(items, (Relation(name, 0, 1),))
            for name in COMPARISONS:
                yield "relative_size", f"{a} {name} {b}", Request(items, (Relation(name, 0, 1),))
            inside = Request(items, (Relation("inside", 0, 1),))
            yield "containment", f"a small {items[0].kind} inside a large {items[1].kind}", inside
            yield "absence", f"{a} and no {items[1].kind}s", Request(items[:1], absent=items[1:])


def _a(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"
