"""The GenEval reward: its rules on objects that are given, its detector, and both together on random weights."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from advflow.data.prompt_files import read_prompts
from advflow.rewards import Prompt, Scores, UnknownPrompt, load_reward
from advflow.rewards.geneval import GenEval, _cut_out
from advflow.rewards.geneval_rules import CLASSES, COLORS, RELATIONS, Found, Verdict, judge, read_request, relations
from advflow.rewards.images import eight_bit, pictures
from torch.nn import functional
from transformers import Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessor

from tests.trainer.reward_models import save_clip, save_mask2former

BOXES = {"left": (0, 40, 20, 60), "right": (80, 40, 100, 60), "top": (40, 0, 60, 20), "middle": (40, 40, 60, 60)}
NO_MASK = np.zeros((0, 0), dtype=bool)


def at(*places: str) -> list[Found]:
    return [Found(tuple(map(float, BOXES[place])), NO_MASK, 0.9) for place in places]


def dog(count: int = 1, **more: Any) -> dict[str, Any]:
    return {"class": "dog", "count": count} | more


def cat(count: int = 1, **more: Any) -> dict[str, Any]:
    return {"class": "cat", "count": count} | more


TWO = [dog(2)], [dog(3)]
LEFT: tuple[Any, Any] = [dog(), cat(position=["left of", 0])], []
RULES = {
    "there": (([dog()], []), {"dog": at("left")}, Verdict(True, True, 1.0)),
    "not there": (([dog()], []), {"cat": at("left")}, Verdict(False, False, 0.0)),
    "more than one": (([dog()], []), {"dog": at("left", "right")}, Verdict(True, False, 0.0)),
    "many more": (([dog()], []), {"dog": at("left", "right", "top")}, Verdict(True, False, -1.0)),
    "one of two": (([dog(), cat()], []), {"cat": at("left")}, Verdict(False, False, 0.5)),
    "counted": (TWO, {"dog": at("left", "right")}, Verdict(True, True, 1.0)),
    "too few": (TWO, {"dog": at("left")}, Verdict(False, False, 0.5)),
    "too many": (TWO, {"dog": at("left", "right", "top")}, Verdict(False, False, 0.5)),
    "colour": (([dog(color="red")], []), {"dog": at("left")}, Verdict(True, True, 1.0)),
    "wrong colour": (([dog(color="red")], []), {"dog": at("right")}, Verdict(False, False, 0.5)),
    "colour of the surest": (([dog(color="red")], []), {"dog": at("left", "right")}, Verdict(True, False, 0.0)),
    "colour of none": (([dog(color="red")], []), {}, Verdict(False, False, 0.0)),
    "place": (LEFT, {"dog": at("right"), "cat": at("left")}, Verdict(True, True, 1.0)),
    # Marks of 1 for each animal, and 0 and 1 for the place.
    "wrong place": (LEFT, {"dog": at("left"), "cat": at("right")}, Verdict(False, False, 0.75)),
    "place of nothing": (LEFT, {"cat": at("left")}, Verdict(False, False, 1 / 3)),
    "nothing in place": (LEFT, {"dog": at("left")}, Verdict(False, False, 1 / 3)),
}  # fmt: skip


def colors(name: str, found: Sequence[Found]) -> list[str]:
    return ["red" if each.box == BOXES["left"] else "blue" for each in found]


@pytest.mark.parametrize("case", RULES)
def test_what_meets_a_request_and_how_far(case: str) -> None:
    (include, exclude), objects, verdict = RULES[case]
    request = read_request(Prompt("x", "colors", {"include": include, "exclude": exclude}))
    found = judge(request, objects, colors)
    assert (found.correct, found.strict) == (verdict.correct, verdict.strict)
    assert found.partial == pytest.approx(verdict.partial, abs=1e-12)


@pytest.mark.parametrize(
    ("box", "other", "expected"),
    [
        ((0, 0, 10, 10), (50, 0, 60, 10), {"left of"}),
        ((50, 0, 60, 10), (0, 0, 10, 10), {"right of"}),
        ((0, 0, 10, 10), (0, 50, 10, 60), {"above"}),
        ((0, 50, 10, 60), (0, 0, 10, 10), {"below"}),
        ((0, 0, 10, 10), (50, 50, 60, 60), {"left of", "above"}),  # 0.68 of the way along either axis
        ((0, 0, 10, 10), (1, 1, 11, 11), set()),  # by less than a tenth of their sizes together
        ((0, 0, 10, 10), (4, 0, 14, 10), set()),  # 2 of 4 pixels are beyond that: half, which is not more than half
    ],
)
def test_where_one_box_lies_of_another(box: Any, other: Any, expected: set[str]) -> None:
    assert relations(box, other) == expected


def lines() -> list[dict[str, Any]]:
    """A line of every form of GenEval's file, every class, colour, number and relation among them."""
    found: list[dict[str, Any]] = []
    for name, other in zip(CLASSES, CLASSES[1:] + CLASSES[:1], strict=True):
        one, two = {"class": name, "count": 1}, {"class": other, "count": 1}
        found.append({"tag": "single_object", "include": [one]})
        found.append({"tag": "two_object", "include": [one, two]})
    for name, relation, count, (color, next_color) in zip(
        CLASSES, itertools.cycle(RELATIONS), itertools.cycle((2, 3, 4)), itertools.cycle(itertools.pairwise(COLORS)),
        strict=False,
    ):  # fmt: skip
        other = CLASSES[CLASSES.index(name) - 1]
        one, two = {"class": name, "count": 1}, {"class": other, "count": 1}
        more = [{"class": name, "count": count + 1}]
        found.append({"tag": "counting", "include": [{"class": name, "count": count}], "exclude": more})
        found.append({"tag": "colors", "include": [one | {"color": next_color}]})
        found.append({"tag": "position", "include": [two, one | {"position": [relation, 0]}]})
        found.append({"tag": "color_attr", "include": [one | {"color": color}, two | {"color": next_color}]})
    return [line | {"prompt": f"a photo, number {number}"} for number, line in enumerate(found)]


def test_every_form_of_line_is_understood(tmp_path: Path) -> None:
    file = tmp_path / "test_metadata.jsonl"
    file.write_text("\n".join(map(json.dumps, lines())))
    requests = [read_request(prompt) for prompt in read_prompts(str(file), "data.prompts")]
    assert len(requests) == 480 and sum(request.counting for request in requests) == 80
    clauses = [clause for request in requests for clause in request.include]
    assert {clause.name for clause in clauses} == set(CLASSES) and len(CLASSES) == 80
    assert {clause.color for clause in clauses} == {None, *COLORS}
    assert {clause.relation for clause in clauses} == {None, *RELATIONS}


@pytest.mark.peers
@pytest.mark.skipif("PEERS" not in os.environ, reason="PEERS names no folder of other people's trainers")
def test_every_line_of_the_published_file_is_understood() -> None:
    file = Path(os.environ["PEERS"]) / "flow_grpo" / "dataset" / "geneval" / "test_metadata.jsonl"
    numbers = [
        number
        for prompt, numbers in read_prompts(str(file), "data.prompts").items()
        if read_request(prompt).include
        for number in numbers
    ]
    assert sorted(numbers) == list(range(1, 2213))


@pytest.mark.parametrize(
    ("metadata", "problem"),
    [
        ({}, "has None under \"include\", where a list of objects belongs"),
        ({"include": []}, "has [] under \"include\""),
        ({"include": ["dog"]}, "holds 'dog', where an object belongs"),
        ({"include": [{"class": "dragon", "count": 1}]}, "asks for the class 'dragon', which is none of COCO's 80"),
        ({"include": [dog(0)]}, "asks for 0 of 'dog', where a number from 1 on belongs"),
        ({"include": [dog(color="mauve")]}, "asks for the colour 'mauve'; there are red, orange"),
        ({"include": [dog(), cat(position=["behind", 0])]}, "has the position ['behind', 0], where relation and ear"),
        ({"include": [dog(position=["above", 0])]}, "has the position ['above', 0], where relation and earlier"),
        ({"include": [dog()], "exclude": "cat"}, "has 'cat' under \"exclude\", where a list of objects belongs"),
    ],
)  # fmt: skip
def test_a_line_that_cannot_be_judged_is_named(metadata: dict[str, Any], problem: str) -> None:
    with pytest.raises(UnknownPrompt) as caught:
        read_request(Prompt("a photo of a dog", "colors", metadata))
    needs = "the reward 'geneval' needs the metadata of GenEval's files; 'a photo of a dog' "
    assert str(caught.value).startswith(needs + problem)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("geneval")
    return {"detector": save_mask2former(folder / "detector"), "clip": save_clip(folder / "clip")}


@pytest.fixture(scope="module")
def reward(models: dict[str, str]) -> GenEval:
    return GenEval(**models)


IMAGES = torch.rand(3, 3, 48, 48, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def published(folder: str, image: torch.Tensor, sure: float) -> dict[str, list[tuple[float, list[float], int]]]:
    """(sureness, box, pixels of the mask) of what mmdet's Mask2Former finds, step by step as there."""
    inputs = Mask2FormerImageProcessor.from_pretrained(folder)(images=[image], return_tensors="pt")
    output = Mask2FormerForUniversalSegmentation.from_pretrained(folder)(**inputs)
    enlarged = functional.interpolate(output.masks_queries_logits, (64, 64), mode="bilinear", align_corners=False)
    logits = functional.interpolate(enlarged, image.shape[-2:], mode="bilinear", align_corners=False)[0]
    scores = output.class_queries_logits[0].softmax(-1)[:, :-1]
    labels = torch.arange(80).repeat(len(scores), 1).flatten()
    best, index = scores.flatten().topk(12, sorted=False)
    logits = logits[index // 80]
    binary = (logits > 0).float()
    best = best * (logits.sigmoid() * binary).flatten(1).sum(1) / (binary.flatten(1).sum(1) + 1e-6)
    found: dict[str, list[tuple[float, list[float], int]]] = {}
    for score, label, mask in sorted(
        zip(best.tolist(), labels[index].tolist(), binary, strict=True), key=lambda x: -x[0]
    ):
        if score > sure:
            rows, columns = mask.nonzero(as_tuple=True)
            box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            found.setdefault(CLASSES[label], []).append((score, [float(side) for side in box], int(mask.sum())))
    return found


def test_the_detector_finds_what_the_published_steps_find(reward: GenEval, models: dict[str, str]) -> None:
    images = eight_bit(IMAGES)
    for image, found in zip(images, reward._detect(images, [False] * 3), strict=True):
        expected = published(models["detector"], image, 0.3)
        assert sum(map(len, expected.values())) > 5
        assert found.keys() == expected.keys()
        for name, objects in found.items():
            for each, (score, box, pixels) in zip(objects, expected[name], strict=True):
                assert each.sureness == pytest.approx(score, abs=1e-4) and abs(int(each.mask.sum()) - pixels) <= 1
                assert each.box == pytest.approx(tuple(box), abs=1)
    assert reward._detect(images, [True] * 3) == [{}, {}, {}]  # nothing is as sure as a count has to be


def test_images_are_scored_by_what_is_found_in_them(reward: GenEval, models: dict[str, str]) -> None:
    found = reward._detect(eight_bit(IMAGES), [False] * 3)
    name = next(name for name, objects in found[0].items() if len(objects) == 1)
    (color,) = reward._color(pictures(IMAGES)[0], name, found[0][name])
    other = COLORS[COLORS.index(color) - 1]
    asked = [(1, color), (1, other), (3, color)]
    prompts = [
        Prompt("x", "colors", {"include": [{"class": name, "count": count, "color": color}]}) for count, color in asked
    ]
    images = IMAGES[:1].expand(3, 3, 48, 48)
    scores = reward(images, prompts)
    torch.testing.assert_close(scores.reward, torch.tensor([1.0, 0.5, (1 / 3 + 0) / 2]))
    assert scores.score.tolist() == [1.0, 0.0, 0.0]
    strict: Scores = load_reward("geneval", models | {"reward": "strict"})(images, prompts)
    assert strict.reward.tolist() == [1.0, 0.0, 0.0]


def test_an_object_is_cut_out_of_a_grey_ground() -> None:
    mask = np.zeros((4, 6), dtype=bool)
    mask[1, 2] = mask[2, 3] = True
    red = torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1).expand(1, 3, 4, 6)
    cut = _cut_out(pictures(red)[0], Found((2.0, 1.0, 4.0, 3.0), mask, 1.0))
    assert cut.permute(1, 2, 0).tolist() == [[[255, 0, 0], [153] * 3], [[153] * 3, [255, 0, 0]]]


def test_a_detector_of_other_classes_is_refused(tmp_path: Path, models: dict[str, str]) -> None:
    folder = save_mask2former(tmp_path, classes=3)
    with pytest.raises(ValueError, match=r"data.reward_args.detector is .* knows 3 classes; accepted are COCO's 80"):
        load_reward("geneval", models | {"detector": folder})
    with pytest.raises(ValueError, match='data.reward_args.reward is \'half\'; accepted: "partial" or "strict"'):
        load_reward("geneval", models | {"reward": "half"})
