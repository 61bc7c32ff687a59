"""What a prompt asks for, and how a line of a prompt file says it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from advflow.shapes.colors import COLORS
from advflow.shapes.forms import SHAPES

POSITIONS = ("left of", "right of", "above", "below", "inside")
SIZES = ("large", "small")
COMPARISONS = ("larger than", "smaller than")
ALIGNMENTS = ("row", "column", "line")
MOST = 6  # of one kind


@dataclass(frozen=True)
class Item:
    """`count` objects of a kind; `color` and `size` are None where the prompt leaves them open."""

    shape: str
    color: str | None = None
    count: int = 1
    size: str | None = None

    @property
    def kind(self) -> str:
        return self.shape if self.color is None else f"{self.color} {self.shape}"


@dataclass(frozen=True)
class Relation:
    """Item number `first` is `name` item number `second`: "left of", "inside", "larger than"."""

    name: str
    first: int
    second: int


@dataclass(frozen=True)
class Request:
    """These objects and no others. `aligned` is how all of them stand; none of `absent` may be there."""

    items: tuple[Item, ...]
    relations: tuple[Relation, ...] = ()
    aligned: str | None = None
    absent: tuple[Item, ...] = ()

    @property
    def count(self) -> int:
        return sum(item.count for item in self.items)


def to_metadata(request: Request) -> dict[str, Any]:
    """`request` as JSON has it: the fields of GenEval's prompt files and, after them, "size" and "aligned"."""
    include = [_entry(item) for item in request.items]
    for relation in request.relations:
        field = "size" if relation.name in COMPARISONS else "position"
        include[relation.first][field] = [relation.name, relation.second]
    metadata: dict[str, Any] = {"include": include}
    if request.aligned:
        metadata["aligned"] = request.aligned
    if request.absent:
        metadata["exclude"] = [_entry(item) for item in request.absent]
    return metadata


def _entry(item: Item) -> dict[str, Any]:
    entry: dict[str, Any] = {"class": item.shape, "count": item.count}
    return entry | {name: value for name, value in (("color", item.color), ("size", item.size)) if value}


def from_metadata(metadata: Mapping[str, object]) -> Request:
    """What `to_metadata` was made of. Raises ValueError saying which field is wrong and what is accepted."""
    include = _list(metadata, "include")
    if not include:
        raise ValueError('"include" is missing; accepted: a list of objects such as {"class": "circle", "count": 1}')
    relations = [
        Relation(_one_of(f"include[{number}].{field}[0]", value[0], names), number, value[1])
        for number, entry in enumerate(include)
        for field, names in (("position", POSITIONS), ("size", COMPARISONS))
        if isinstance(value := entry.get(field), list) and _is_relation(f"include[{number}].{field}", value, include)
    ]
    aligned = metadata.get("aligned")
    return Request(
        items=tuple(_item(f"include[{number}]", entry) for number, entry in enumerate(include)),
        relations=tuple(relations),
        aligned=None if aligned is None else _one_of("aligned", aligned, ALIGNMENTS),
        absent=tuple(_item(f"exclude[{number}]", entry) for number, entry in enumerate(_list(metadata, "exclude"))),
    )


def _list(metadata: Mapping[str, object], field: str) -> list[dict[str, Any]]:
    value = metadata.get(field, [])
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise ValueError(f'"{field}" is {value!r:.60}; accepted: a list of objects')
    return value


def _item(where: str, entry: dict[str, Any]) -> Item:
    count, color, size = entry.get("count", 1), entry.get("color"), entry.get("size")
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MOST:
        raise ValueError(f"{where}.count is {count!r:.40}; accepted: 1 to {MOST}")
    return Item(
        _one_of(f"{where}.class", entry.get("class"), SHAPES),
        None if color is None else _one_of(f"{where}.color", color, COLORS),
        count,
        None if size is None or isinstance(size, list) else _one_of(f"{where}.size", size, SIZES),
    )


def _one_of(where: str, value: object, names: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in names:
        raise ValueError(f"{where} is {value!r:.40}; accepted: {', '.join(names)}")
    return value


def _is_relation(where: str, value: list[Any], include: list[dict[str, Any]]) -> bool:
    others = [number for number, entry in enumerate(include) if entry.get(where.rpartition(".")[2]) is not value]
    if len(value) != 2 or type(value[1]) is not int or value[1] not in others:
        pair = 'a pair such as ["left of", 1], with the number of another entry'
        raise ValueError(f"{where} is {value!r:.60}; accepted: {pair}")
    return True
