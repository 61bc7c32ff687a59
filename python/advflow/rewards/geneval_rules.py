"""What GenEval (arXiv 2310.11513) asks of an image, and whether the objects that were found in it are that.

Two verdicts: GenEval's own, and flow_grpo's, which wants the very number of objects and counts what is met in part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from advflow.data.prompt import Prompt, UnknownPrompt

# In the order of COCO's 80 classes, which detectors number, by the names that GenEval's prompts give them.
CLASSES = tuple(
    """person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,parking meter,
bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,skis,
snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,cup,fork,
knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,potted plant,bed,
dining table,toilet,tv,laptop,computer mouse,tv remote,computer keyboard,cell phone,microwave,oven,toaster,sink,
refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush""".replace("\n", "").split(",")
)
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
_POSITION_THRESHOLD = 0.1


@dataclass(frozen=True)
class Clause:
    """`count` objects of a class, of a colour, or placed with respect to those of the earlier clause `target`."""

    name: str
    count: int
    color: str | None = None
    relation: str | None = None
    target: int = 0


@dataclass(frozen=True)
class Request:
    """What is wanted, and what of it would be too many. Counting asks the detector to be surer of what it sees."""

    include: tuple[Clause, ...]
    exclude: tuple[Clause, ...]
    counting: bool


@dataclass(frozen=True)
class Found:
    """An object in an image: its box (left, top, right, bottom) and mask [H, W], in pixels, and how sure it is."""

    box: tuple[float, float, float, float]
    mask: np.ndarray
    sureness: float


Objects = Mapping[str, Sequence[Found]]
"""By class, the surest first."""


@dataclass(frozen=True)
class Verdict:
    """`correct`: GenEval's. `strict` and `partial`: flow_grpo's; the latter is 1 where all is met, and falls below 0
    where there is more than twice as much as is wanted."""

    correct: bool
    strict: bool
    partial: float


def read_request(prompt: Prompt) -> Request:
    """What the metadata of a line of GenEval's file asks for. Raises UnknownPrompt where that cannot be judged."""
    include = prompt.metadata.get("include")
    if not isinstance(include, list) or not include:
        raise _unknown(prompt, f'has {include!r:.40} under "include", where a list of objects belongs')
    exclude = prompt.metadata.get("exclude", [])
    if not isinstance(exclude, list):
        raise _unknown(prompt, f'has {exclude!r:.40} under "exclude", where a list of objects belongs')
    wanted = tuple(_clause(prompt, each, place) for place, each in enumerate(include))
    return Request(wanted, tuple(_clause(prompt, each, 0) for each in exclude), prompt.category == "counting")


def _clause(prompt: Prompt, values: object, place: int) -> Clause:
    if not isinstance(values, dict):
        raise _unknown(prompt, f"holds {values!r:.40}, where an object belongs")
    name, count = values.get("class"), values.get("count")
    if name not in CLASSES:
        raise _unknown(prompt, f"asks for the class {name!r}, which is none of COCO's 80")
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise _unknown(prompt, f"asks for {count!r} of {name!r}, where a number from 1 on belongs")
    color = values.get("color")
    if color is not None and color not in COLORS:
        raise _unknown(prompt, f"asks for the colour {color!r}; there are {', '.join(COLORS)}")
    if "position" not in values:
        return Clause(name, count, color)
    match values["position"]:
        case [str(relation), int(target)] if relation in RELATIONS and 0 <= target < place:
            return Clause(name, count, color, relation, target)
    raise _unknown(prompt, f"has the position {values['position']!r:.40}, where relation and earlier object belong")


def _unknown(prompt: Prompt, problem: str) -> UnknownPrompt:
    return UnknownPrompt(f"the reward 'geneval' needs the metadata of GenEval's files; {prompt.text!r:.60} {problem}")


def judge(request: Request, objects: Objects, colors: Callable[[str, Sequence[Found]], list[str]]) -> Verdict:
    """`colors` says which colour each of some objects of a class has."""
    strict, partial = _counted(request, objects, colors)
    return Verdict(_correct(request, objects, colors), strict, partial)


def _correct(request: Request, objects: Objects, colors: Callable[[str, Sequence[Found]], list[str]]) -> bool:
    """As GenEval's evaluate_images.py: so many objects or more, judged by the surest of them."""
    groups: list[Sequence[Found] | None] = []
    for wanted in request.include:
        found = objects.get(wanted.name, [])[: wanted.count]
        met = len(found) == wanted.count
        if met and wanted.color is not None:
            met = colors(wanted.name, found).count(wanted.color) == wanted.count
        if met and wanted.relation is not None:
            met = _placed(found, groups[wanted.target], wanted.relation)
        groups.append(found if met else None)
    too_many = any(len(objects.get(unwanted.name, [])) >= unwanted.count for unwanted in request.exclude)
    return None not in groups and not too_many


def _counted(
    request: Request, objects: Objects, colors: Callable[[str, Sequence[Found]], list[str]]
) -> tuple[bool, float]:
    """As flow_grpo's reward server, DiffusionNFT and their relatives: exactly so many objects, and the mean of marks.

    A position that is wrong gets a mark of 0 and then one of 1, as there: every published run has learnt from that.
    """
    marks: list[float] = []
    groups: list[Sequence[Found] | None] = []
    for wanted in request.include:
        found = objects.get(wanted.name, [])
        marks.append(1 - abs(wanted.count - len(found)) / wanted.count)
        met = len(found) == wanted.count
        if not met and (wanted.color is not None or wanted.relation is not None):
            marks.append(0.0)
        if met and wanted.color is not None:
            right = colors(wanted.name, found).count(wanted.color)
            marks.append(1 - abs(wanted.count - right) / wanted.count)
            met = right == wanted.count
        if met and wanted.relation is not None:
            met = _placed(found, groups[wanted.target], wanted.relation)
            marks += [1.0] if met else [0.0] if groups[wanted.target] is None else [0.0, 1.0]
        groups.append(found if met else None)
    return None not in groups, sum(marks) / len(marks)


def _placed(found: Sequence[Found], targets: Sequence[Found] | None, relation: str) -> bool:
    return targets is not None and all(
        relation in relations(each.box, target.box) for each in found for target in targets
    )


def relations(box: Sequence[float], other: Sequence[float]) -> set[str]:
    """Where `box` lies of `other`: by more than a tenth of their sizes, and not much more along the other axis."""
    corners = np.array([box, other], dtype=np.float64).reshape(2, 2, 2)
    (center, other_center), sizes = corners.mean(1), np.abs(corners[:, 1] - corners[:, 0])
    offset = center - other_center
    beyond = np.maximum(np.abs(offset) - _POSITION_THRESHOLD * sizes.sum(0), 0) * np.sign(offset)
    if (np.abs(beyond) < 1e-3).all():
        return set()
    x, y = beyond / np.linalg.norm(offset)
    return {name for name, along in zip(RELATIONS, (-x, x, -y, y), strict=True) if along > 0.5}
