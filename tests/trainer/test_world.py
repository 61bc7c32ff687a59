"""The embedded world: its scenes, its prompts, and whether its reward tells the truth."""

from __future__ import annotations

import numpy as np
import pytest
from advflow.world.captions import held_out_captions, training_captions
from advflow.world.reward import detect, score
from advflow.world.scene import (
    CATEGORIES,
    COLORS,
    IMAGE_SIZE,
    SHAPES,
    Caption,
    Placed,
    Wanted,
    all_captions,
    relation_holds,
    render,
    sample_scene,
)

RED_CIRCLE = Placed("circle", "red", 8, 8, 5.5)
BLUE_SQUARE = Placed("square", "blue", 23, 22, 5.5)
ATTRIBUTION = Caption(
    "a red circle and a blue square", "color_attribution", (Wanted("circle", "red"), Wanted("square", "blue"))
)


@pytest.mark.parametrize("category", CATEGORIES)
def test_reward_is_right_on_rendered_truth(category: str) -> None:
    rng = np.random.default_rng(7)
    prompts = [prompt for prompt in all_captions() if prompt.category == category]
    scenes = [prompts[rng.integers(len(prompts))] for _ in range(300)]
    correct = [score(render(sample_scene(prompt, rng)), prompt).correct for prompt in scenes]
    assert np.mean(correct) >= 0.95


@pytest.mark.parametrize("category", CATEGORIES)
def test_reward_is_right_on_scenes_of_another_prompt(category: str) -> None:
    """Scenes that do not fulfil a prompt are refused as reliably as fitting ones are accepted."""
    rng = np.random.default_rng(8)
    prompts = [prompt for prompt in all_captions() if prompt.category == category]
    others = [prompt for prompt in all_captions() if prompt.category != category]
    accepted: list[bool] = []
    while len(accepted) < 300:
        prompt, other = prompts[rng.integers(len(prompts))], others[rng.integers(len(others))]
        scene = sample_scene(other, rng)
        if not _fulfils(scene, prompt):
            accepted.append(score(render(scene), prompt).correct)
    assert np.mean(accepted) <= 0.05


def _fulfils(scene: list[Placed], prompt: Caption) -> bool:
    """Whether a scene, taken as drawn, shows what a prompt asks for (position prompts: only if clearly not)."""
    wanted = sorted(str(w) for w in prompt.wanted)
    colored = prompt.wanted[0].color is not None
    shown = sorted(f"{p.color} {p.shape}" if colored else p.shape for p in scene)
    return wanted == shown


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("color", COLORS)
@pytest.mark.parametrize("radius", [4.5, 6.0, 8.0])
def test_detector_names_shape_color_and_place(shape: str, color: str, radius: float) -> None:
    (found,) = detect(render([Placed(shape, color, 14.3, 17.8, radius)]))
    assert (found.shape, found.color) == (shape, color)
    assert abs(found.x - 14.3) < 1 and abs(found.y - 17.8) < 1


def test_detector_survives_images_that_are_not_finite() -> None:
    image = render([RED_CIRCLE])
    image[:, 20:, 20:] = np.nan
    assert [found.color for found in detect(image)] == ["red"]
    assert detect(np.full_like(image, np.nan)) == []


@pytest.mark.parametrize(
    ("scene", "partial"),
    [
        ([RED_CIRCLE, BLUE_SQUARE], 1.0),
        ([Placed("circle", "blue", 8, 8, 5.5), Placed("square", "red", 23, 22, 5.5)], 0.5),
        ([RED_CIRCLE], 0.5),
        ([Placed("square", "red", 8, 8, 5.5)], 0.25),
        ([RED_CIRCLE, BLUE_SQUARE, Placed("triangle", "green", 24, 7, 5)], 2 / 3),
        ([], 0.0),
    ],
)
def test_partial_score_counts_what_is_met(scene: list[Placed], partial: float) -> None:
    result = score(render(scene), ATTRIBUTION)
    assert result.partial == pytest.approx(partial)
    assert result.correct == (partial == 1.0)


@pytest.mark.parametrize(("relation", "holds"), [("left of", True), ("right of", False), ("above", False)])
def test_position_needs_the_dominant_direction(relation: str, holds: bool) -> None:
    assert relation_holds(relation, (8, 12), (24, 18), margin=4) == holds
    prompt = Caption("", "position", (Wanted("circle"), Wanted("square")), relation)
    scene = [Placed("circle", "red", 8, 12, 5), Placed("square", "blue", 24, 18, 5)]
    assert score(render(scene), prompt).correct == holds


def test_scenes_stay_inside_the_image_and_apart() -> None:
    rng = np.random.default_rng(0)
    for prompt in all_captions():
        scene = sample_scene(prompt, rng)
        assert [p.shape for p in scene] == [w.shape for w in prompt.wanted]
        for index, p in enumerate(scene):
            assert p.radius <= min(p.x, p.y) and max(p.x, p.y) + p.radius <= IMAGE_SIZE
            for q in scene[:index]:
                assert max(abs(p.x - q.x), abs(p.y - q.y)) >= p.radius + q.radius + 2


def test_held_out_captions_are_never_trained_on() -> None:
    held_out = held_out_captions()
    assert len(held_out) >= 384
    assert {prompt.category for prompt in held_out} == set(CATEGORIES)
    training = {prompt.text for prompt in training_captions()}
    assert training.isdisjoint(prompt.text for prompt in held_out)
    texts = [prompt.text for prompt in all_captions()]
    assert len(texts) == len(set(texts))
