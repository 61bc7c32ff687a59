"""The shapes rule on objects as found: partial credit, relations, what cheating brings."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from advflow.shapes.objects import Found
from advflow.shapes.request import ALIGNMENTS, COMPARISONS, POSITIONS, SIZES, Item, Relation, Request
from advflow.shapes.score import RELATIONS, score_objects
from hypothesis import given
from hypothesis import strategies as st

RED_CIRCLE, BLUE_SQUARE = Item("circle", "red"), Item("square", "blue")
BOTH = Request((RED_CIRCLE, BLUE_SQUARE))
MIRROR = {"left of": "right of", "right of": "left of", "above": "below", "below": "above", "inside": "inside"}
MIRROR |= {"larger than": "smaller than", "smaller than": "larger than"}


def found(shape: str | None, color: str, x: float = 0.3, y: float = 0.5, area: float = 0.04, side: int = 20) -> Found:
    """An object whose mask is a square of `side` pixels of 100."""
    corner = (round(100 * y) - side // 2, round(100 * x) - side // 2)
    return Found(shape, color, x, y, side / 100, area, corner, np.ones((side, side), bool))


places = st.floats(0.1, 0.9)
# Few shapes and colours, so that what is found is often what is asked for.
founds = st.builds(
    found, st.sampled_from(["circle", "square", None]), st.sampled_from(["red", "blue"]), places, places,
    st.floats(0.003, 0.4), st.integers(2, 20),
)  # fmt: skip
kinds = st.builds(Item, st.sampled_from(["circle", "square"]), st.sampled_from([None, "red", "blue"]))
clauses = st.sampled_from([*POSITIONS, *COMPARISONS])


@st.composite
def requests(draw: st.DrawFn) -> Request:
    items = draw(st.lists(kinds, min_size=1, max_size=3))
    items[0] = replace(items[0], count=draw(st.integers(1, 4)), size=draw(st.sampled_from([None, *SIZES])))
    relations = [Relation(draw(clauses), 0, 1)] if len(items) > 1 else []
    aligned = draw(st.sampled_from([None, *ALIGNMENTS]))
    return Request(tuple(items), tuple(relations), aligned, tuple(draw(st.lists(kinds, max_size=1))))


@given(st.lists(founds, max_size=7), requests())
def test_a_score_is_a_share_and_full_exactly_where_all_is_met(objects: list[Found], request: Request) -> None:
    score = score_objects(objects, request)
    assert 0 <= score.partial <= 1
    assert score.strict == (score.partial == 1)
    if score.strict:
        shown = sorted((each.shape or "", each.color) for each in objects)
        assert len(shown) == request.count
        for item in request.items:
            assert sum(s == item.shape and item.color in (None, c) for s, c in shown) >= item.count
        assert not any(item.shape == s and item.color in (None, c) for item in request.absent for s, c in shown)


@given(st.lists(founds, min_size=1, max_size=6), requests(), clauses)
def test_a_clause_that_holds_never_lowers_a_score(objects: list[Found], request: Request, clause: str) -> None:
    if len(request.items) < 2:
        return
    one, two = request.items[0].kind, request.items[1].kind
    before = score_objects(objects, request).partial
    fits = [
        (a, b)
        for a in objects
        for b in objects
        if a is not b and _is(a, request.items[0]) and _is(b, request.items[1]) and RELATIONS[clause](a, b) >= 1
    ]
    after = score_objects(objects, replace(request, relations=(*request.relations, Relation(clause, 0, 1)))).partial
    if fits:
        assert after >= before - 1e-12, (one, two)
    else:
        assert after < 1


def _is(each: Found, item: Item) -> bool:
    return each.shape == item.shape and item.color in (None, each.color)


@given(st.lists(founds, min_size=2, max_size=5), clauses)
def test_a_relation_the_other_way_round_is_its_mirror(objects: list[Found], clause: str) -> None:
    """Who is left of whom turns with the picture, and with who is named first."""
    a, b = objects[:2]
    if clause == "inside":
        return
    assert RELATIONS[clause](a, b) == RELATIONS[MIRROR[clause]](b, a)
    flipped = [replace(each, x=1 - each.x, y=1 - each.y) for each in objects]
    if clause in COMPARISONS:
        assert RELATIONS[clause](flipped[0], flipped[1]) == RELATIONS[clause](a, b)
    else:
        assert RELATIONS[clause](flipped[0], flipped[1]) == pytest.approx(RELATIONS[clause](b, a))
        moved = [replace(each, x=each.x + 0.05, y=each.y - 0.05) for each in objects]
        assert RELATIONS[clause](moved[0], moved[1]) == pytest.approx(RELATIONS[clause](a, b))


@given(st.permutations([found("circle", "red"), found("square", "blue", 0.7), found("star", "green", 0.5, 0.2)]))
def test_the_order_in_which_objects_are_found_is_nothing(objects: list[Found]) -> None:
    request = Request((RED_CIRCLE, BLUE_SQUARE), (Relation("left of", 0, 1),))
    assert score_objects(objects, request).partial == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("objects", "partial"),
    [
        ([found("circle", "red"), found("square", "blue")], 1.0),
        ([found("circle", "blue"), found("square", "red")], 0.5),
        ([found("circle", "red")], 0.5),
        ([found("square", "red")], 0.25),
        ([found(None, "red"), found(None, "blue")], 0.5),
        ([found("circle", "red"), found("square", "blue"), found(None, "green")], 2 / 3),
        ([], 0.0),
    ],
)
def test_each_object_has_half_a_point_for_its_shape_and_half_for_its_colour(
    objects: list[Found], partial: float
) -> None:
    assert score_objects(objects, BOTH).partial == pytest.approx(partial)


@pytest.mark.parametrize(
    ("x", "y", "value"),
    [
        (0.7, 0.5, 1.0),
        (0.7, 0.89, 1.0),
        (0.7, 0.9, 1.0),
        (0.5, 0.9, 0.5),
        (0.35, 0.5, 0.5),
        (0.3, 0.5, 0),
        (0.1, 0.5, 0),
    ],
)
def test_left_of_asks_for_the_larger_distance_and_a_tenth_of_the_image(x: float, y: float, value: float) -> None:
    request = replace(BOTH, relations=(Relation("left of", 0, 1),))
    score = score_objects([found("circle", "red"), found("square", "blue", x, y)], request)
    assert score.partial == pytest.approx((2 + value) / 3)


@pytest.mark.parametrize(("size", "extent", "value"), [
    ("large", 0.33, 1), ("large", 0.5, 1), ("large", 0.255, 0.5), ("large", 0.18, 0), ("large", 0.1, 0),
    ("small", 0.18, 1), ("small", 0.06, 1), ("small", 0.255, 0.5), ("small", 0.33, 0),
])  # fmt: skip
def test_sizes_have_a_middle_that_is_neither(size: str, extent: float, value: float) -> None:
    request = Request((replace(RED_CIRCLE, size=size),))
    assert score_objects([found("circle", "red", area=extent**2)], request).partial == pytest.approx((1 + value) / 2)
    assert score_objects([found("star", "green", area=extent**2)], request).partial == 0


@pytest.mark.parametrize(("ratio", "value"), [(1.5, 1), (3, 1), (1.25, 0.5), (1, 0), (0.5, 0)])
def test_larger_is_half_as_large_again(ratio: float, value: float) -> None:
    request = replace(BOTH, relations=(Relation("larger than", 0, 1),))
    objects = [found("circle", "red", area=0.04 * ratio), found("square", "blue", 0.7)]
    assert score_objects(objects, request).partial == pytest.approx((2 + value) / 3)


@pytest.mark.parametrize(("x", "value"), [(0.5, 1), (0.56, 1), (0.65, 0.5 / 0.95), (0.9, 0)])
def test_inside_is_the_share_within_the_others_outline(x: float, value: float) -> None:
    request = replace(BOTH, relations=(Relation("inside", 0, 1),))
    outer = found("square", "blue", 0.5, 0.5, 0.09, side=30)
    score = score_objects([found("circle", "red", x, 0.5, 0.01, side=10), outer], request)
    assert score.partial == pytest.approx((2 + value) / 3)
    larger = found("circle", "red", 0.5, 0.5, 0.16, side=40)
    assert score_objects([larger, outer], request).partial == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("name", "places", "value"),
    [
        ("row", [(0.2, 0.5), (0.5, 0.5), (0.8, 0.54)], 1),
        ("row", [(0.2, 0.5), (0.5, 0.6), (0.8, 0.5)], 0.5),
        ("row", [(0.5, 0.2), (0.5, 0.5), (0.5, 0.8)], 0),
        ("column", [(0.5, 0.2), (0.5, 0.5), (0.5, 0.8)], 1),
        ("column", [(0.2, 0.5), (0.5, 0.5), (0.8, 0.5)], 0),
        ("line", [(0.2, 0.2), (0.5, 0.5), (0.8, 0.8)], 1),
        ("line", [(0.2, 0.5), (0.5, 0.1), (0.8, 0.5)], 0),
    ],
)
def test_objects_stand_in_a_line_up_to_a_part_of_their_extent(
    name: str, places: list[tuple[float, float]], value: float
) -> None:
    request = Request((replace(RED_CIRCLE, count=3),), aligned=name)
    score = score_objects([found("circle", "red", *place) for place in places], request)
    assert score.partial == pytest.approx((3 + value) / 4)
    assert score_objects([found("circle", "red", *place) for place in places[:2]], request).partial == 0.5


def test_absence_needs_what_should_be_there() -> None:
    """Leaving everything out is not the way to leave one thing out."""
    request = Request((RED_CIRCLE,), absent=(BLUE_SQUARE,))
    assert score_objects([], request).partial == 0
    assert score_objects([found("star", "green")], request).partial == 0
    assert score_objects([found("circle", "red")], request).strict
    assert score_objects([found("circle", "red"), found("square", "blue")], request).partial == 0.25
    assert score_objects([found("circle", "red"), found("circle", "blue")], request).partial == 0.5
