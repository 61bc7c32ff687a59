"""The shapes rule on pixels: drawn scenes, what models do to drawings, and what a policy might draw instead."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
import torch
from advflow.data.prompt import Prompt
from advflow.rewards import load_reward
from advflow.shapes.colors import COLORS, PALETTE, SEEN, name_pixels
from advflow.shapes.forms import SHAPES
from advflow.shapes.near_miss import near_misses
from advflow.shapes.objects import find_objects
from advflow.shapes.perturb import PERTURBATIONS
from advflow.shapes.prompts import CATEGORIES, ShapesPrompt, training_prompts
from advflow.shapes.request import Item, Relation, Request, to_metadata
from advflow.shapes.scene import Drawn, render, sample_scene
from advflow.shapes.score import score_image, score_objects

SCENES = 9  # of each category
RED_CIRCLE, BLUE_SQUARE = Item("circle", "red"), Item("square", "blue")
BOTH = Request((RED_CIRCLE, BLUE_SQUARE))


def of_each_category(count: int) -> list[ShapesPrompt]:
    prompts = defaultdict(list)
    for prompt in training_prompts():
        prompts[prompt.category].append(prompt)
    return [prompts[category][number % len(prompts[category])] for category in CATEGORIES for number in range(count)]


@pytest.fixture(scope="module")
def scenes() -> list[tuple[Request, np.ndarray]]:
    rng = np.random.default_rng(11)
    requests = [prompt.request for prompt in of_each_category(SCENES)]
    return [(request, render(sample_scene(request, rng))) for request in requests]


def share_read(scenes: list[tuple[Request, np.ndarray]]) -> float:
    return float(np.mean([score_image(image, request).strict for request, image in scenes]))


def test_drawn_scenes_are_read(scenes: list[tuple[Request, np.ndarray]]) -> None:
    assert share_read(scenes) >= 0.99


@pytest.mark.parametrize("kind", PERTURBATIONS)
def test_they_are_read_through_what_models_do_to_drawings(kind: str, scenes: list[tuple[Request, np.ndarray]]) -> None:
    rng, start = np.random.default_rng(12), list(PERTURBATIONS).index(kind)
    seen = scenes[start % 3 :: 3]
    assert share_read([(request, PERTURBATIONS[kind](image, rng)) for request, image in seen]) >= 0.95


@pytest.mark.slow
def test_every_category_is_read_through_every_perturbation() -> None:
    rng = np.random.default_rng(13)
    read = defaultdict(list)
    for category in CATEGORIES:
        of_category = [prompt.request for prompt in training_prompts() if prompt.category == category]
        for request in (of_category[rng.integers(len(of_category))] for _ in range(24)):
            image = render(sample_scene(request, rng))
            for kind, perturb in PERTURBATIONS.items():
                strict = score_image(perturb(image, rng), request).strict
                read[category].append(strict)
                read[kind].append(strict)
    shares = {name: float(np.mean(each)) for name, each in read.items()}
    assert min(shares.values()) >= 0.95, shares


@pytest.mark.parametrize(
    "background", [(1, 1, 1), (0.99, 0.97, 0.88), (0.75, 0.75, 0.75), (0.85, 0.92, 1), (0.1, 0.5, 0.5)]
)
def test_the_background_is_whatever_most_of_the_rim_is(background: tuple[float, float, float]) -> None:
    scene = [Drawn("circle", "red", 0.3, 0.3, 0.2), Drawn("square", "blue", 0.7, 0.6, 0.25, 0.2)]
    assert score_image(render(scene, background), BOTH).strict
    dark = [Drawn("circle", "red", 0.3, 0.3, 0.2), Drawn("square", "black", 0.7, 0.6, 0.25, 0.2)]
    assert [each.color for each in find_objects(render(dark, (0.05, 0.05, 0.05)))] == ["red"]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("color", COLORS)
def test_every_kind_is_named_where_it_is(shape: str, color: str) -> None:
    turn = 2.1 if shape not in ("square", "rectangle") else 0.4
    (seen,) = find_objects(render([Drawn(shape, color, 0.36, 0.58, 0.12, turn)], side=256))
    assert (seen.shape, seen.color) == (shape, color)
    assert abs(seen.x - 0.36) < 0.012 and abs(seen.y - 0.58) < 0.012
    assert seen.area == pytest.approx(0.0144, rel=0.08)


@pytest.mark.parametrize(("side", "size"), [(32, 0.35), (64, 0.2), (384, 0.1), (1024, 0.1)])
def test_it_reads_other_resolutions(side: int, size: float) -> None:
    scene = [Drawn("triangle", "green", 0.3, 0.3, size), Drawn("square", "pink", 0.75, 0.7, size)]
    request = Request((Item("triangle", "green"), Item("square", "pink")), (Relation("above", 0, 1),))
    assert score_image(render(scene, side=side), request).partial >= 2 / 3


def test_wide_images_are_measured_by_their_short_side() -> None:
    image = np.concatenate([render([Drawn("circle", "red", 0.5, 0.5, 0.2)]), np.ones((3, 512, 256), np.float32)], 2)
    (seen,) = find_objects(image)
    assert seen.shape == "circle" and seen.area == pytest.approx(0.04 / 1.5, rel=0.05)
    assert (seen.x, seen.y) == (pytest.approx(0.5, abs=0.01), pytest.approx(0.5, abs=0.01))


@pytest.mark.parametrize(
    ("name", "rgb"),
    [
        ("red", "ff0000 dc143c b22222 8b0000 fa8072 dc2828"),
        ("orange", "ffa500 ff8c00 ff7f32 e07b20"),
        ("yellow", "ffff00 ffd700 ffc107 f0e68c"),
        ("green", "00ff00 008000 228b22 90ee90 50c878 9acd32"),
        ("blue", "0000ff 000080 1e90ff 4169e1 87ceeb 0091f0"),
        ("purple", "800080 8a2be2 4b0082 9370db"),
        ("pink", "ffc0cb ff69b4 ff1493 ff00ff ee82ee"),
        ("black", "000000 141414 36454f"),
        ("cyan", "008080 00ffff 40e0d0"),
        (None, "ffffff f5f5dc fffdd0 808080 d3d3d3 c8c8cd"),
    ],
)
def test_colours_have_the_names_people_give_them(name: str | None, rgb: str) -> None:
    pixels = np.array([[int(code[i : i + 2], 16) / 255 for code in rgb.split()] for i in (0, 2, 4)])[:, None]
    assert [(None, *SEEN)[index] for index in name_pixels(pixels)[0]] == [name] * pixels.shape[2]


@pytest.mark.parametrize("color", [color for color in COLORS if color != "black"])
def test_a_colour_keeps_its_name_in_the_shade_and_in_the_light(color: str) -> None:
    rgb = np.array(PALETTE[color])
    shades = [rgb * light for light in (0.6, 0.8, 1.0)] + [rgb + (1 - rgb) * white for white in (0.15, 0.3)]
    assert {SEEN[index - 1] for index in name_pixels(np.array(shades).T[:, None])[0]} == {color}


def test_a_scene_with_one_thing_wrong_scores_less() -> None:
    rng = np.random.default_rng(14)
    kinds = set()
    for prompt in of_each_category(2):
        for kind, wrong in near_misses(prompt.request).items():
            score = score_image(render(sample_scene(wrong, rng), side=256), prompt.request)
            assert score.partial < 1 and not score.strict, (kind, prompt.text)
            kinds.add(kind)
    assert len(kinds) == 9


def patchwork(cells: int) -> np.ndarray:
    size = 0.8 / cells
    return render([
        Drawn("square", COLORS[(row * 3 + column) % len(COLORS)], (column + 0.5) / cells, (row + 0.5) / cells, size)
        for row in range(cells) for column in range(cells)
    ])  # fmt: skip


def texture() -> np.ndarray:
    """Soft patches of every hue."""
    coarse = np.random.default_rng(15).uniform(0, 1, (3, 16, 16)).astype(np.float32)
    return torch.nn.functional.interpolate(torch.from_numpy(coarse)[None], size=512, mode="bilinear")[0].numpy()


CHEATS = {
    "nothing": np.full((3, 512, 512), 0.97, np.float32),
    "darkness": np.zeros((3, 512, 512), np.float32),
    "one colour": np.broadcast_to(np.array([0.86, 0.16, 0.16], np.float32)[:, None, None], (3, 512, 512)),
    "noise": np.random.default_rng(16).uniform(0, 1, (3, 512, 512)).astype(np.float32),
    "texture": texture(),
    "large patches": patchwork(4),
    "small patches": patchwork(10),
}


@pytest.mark.parametrize("kind", CHEATS)
def test_what_is_drawn_for_every_prompt_alike_brings_nothing(kind: str) -> None:
    objects = find_objects(CHEATS[kind])
    scores = [score_objects(objects, prompt.request).partial for prompt in of_each_category(8)]
    assert max(scores) <= 0.25 and np.mean(scores) < 0.05


def test_a_blank_image_scores_nothing_for_what_it_leaves_out() -> None:
    asked = [prompt for prompt in training_prompts() if prompt.category == "absence"][:20]
    assert all(score_image(CHEATS["nothing"], prompt.request).partial == 0 for prompt in asked)


def test_specks_and_lines_are_no_objects() -> None:
    specks = [
        Drawn("circle", "red", (column + 0.5) / 12, (row + 0.5) / 12, 0.045)
        for row in range(12)
        for column in range(12)
    ]
    assert find_objects(render(specks)) == []
    circle = Drawn("circle", "red", 0.5, 0.5, 0.4)
    ring, hole = render([circle]), render([Drawn("circle", "black", 0.5, 0.5, 0.36)])
    ring[:, hole[0] < 0.5] = 0.97
    assert find_objects(ring) == []


def test_an_object_may_fill_the_one_around_it() -> None:
    square, circle = Drawn("square", "blue", 0.5, 0.5, 0.5), Drawn("circle", "red", 0.5, 0.5, 0.41)
    request = Request(BOTH.items, (Relation("inside", 0, 1),))
    assert score_image(render([square, circle]), request).strict
    assert score_image(render([square, Drawn("circle", "red", 0.5, 0.29, 0.2)]), request).partial < 1


def test_every_answer_at_once_is_worth_less_than_one() -> None:
    """Two circles, one on each side, meet "left of" and "right of"; one too many costs a third."""
    request = Request(BOTH.items, (Relation("left of", 0, 1),))
    square = Drawn("square", "blue", 0.5, 0.5, 0.15)
    left, right = (Drawn("circle", "red", x, 0.5, 0.15) for x in (0.2, 0.8))
    assert score_image(render([left, square]), request).partial == 1
    assert score_image(render([left, square, right]), request).partial == pytest.approx(2 / 3)
    assert score_image(render([square, right]), request).partial == pytest.approx(2 / 3)


def test_half_and_half_is_neither() -> None:
    """A circle of two colours is two half discs, and a shape between two has one name."""
    halves = render([Drawn("circle", "red", 0.5, 0.5, 0.3)])
    halves[:, :, 256:] = render([Drawn("circle", "blue", 0.5, 0.5, 0.3)])[:, :, 256:]
    for color in ("red", "blue"):
        assert score_image(halves, Request((Item("circle", color),))).partial <= 0.25
    y, x = np.mgrid[-1:1:256j, -1:1:256j]
    for power in np.linspace(2, 12, 11):
        between = np.full((3, 256, 256), 0.97)
        between[:, (np.abs(x * 2) ** power + np.abs(y * 2) ** power) < 1] = np.array(PALETTE["red"])[:, None]
        named = [score_image(between, Request((Item(shape, "red"),))).strict for shape in SHAPES]
        assert sum(named) <= 1


def test_the_reward_is_the_mean_of_both_and_nothing_for_what_is_not_finite() -> None:
    scene = render([Drawn("circle", "red", 0.3, 0.5, 0.2), Drawn("square", "blue", 0.7, 0.5, 0.2)])
    half = render([Drawn("circle", "red", 0.3, 0.5, 0.2)])
    broken = scene.copy()
    broken[0, 3, 5] = np.inf
    prompt = Prompt("a red circle and a blue square", "color_attribution", to_metadata(BOTH))
    scores = load_reward("shapes")(torch.from_numpy(np.stack([scene, half, broken])), [prompt] * 3)
    assert scores.reward[:2].tolist() == [1.0, 0.25] and scores.score[:2].tolist() == [1.0, 0.0]
    assert scores.reward.isnan().tolist() == scores.score.isnan().tolist() == [False, False, True]
