"""The prompts of the shapes rule: what is asked, what is held out, how files say it, and a run on them."""

from __future__ import annotations

import errno
import json
import math
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from advflow.cli import main
from advflow.data.prompt_files import read_prompts
from advflow.data.prompts import check_prompts, load_eval_prompts, load_training_prompts
from advflow.models.encoding import IN_MEMORY_AT_MOST
from advflow.rewards import Prompt, UnknownPrompt, load_reward
from advflow.settings.data import DataConfig
from advflow.settings.sources import resolve_configs, to_config, train_parser
from advflow.shapes.prompts import CATEGORIES, STYLES, held_out_prompts, training_prompts
from advflow.shapes.request import Item, Relation, Request, from_metadata, to_metadata
from PIL import Image

from tests.trainer.runs import SMALL


def test_every_category_has_its_share() -> None:
    sizes = Counter(prompt.category for prompt in training_prompts())
    assert tuple(sizes) == CATEGORIES and sum(sizes.values()) <= IN_MEMORY_AT_MOST
    assert sizes.pop("single_object") == 4 * len(STYLES)  # of six shapes two are held out
    assert all(110 <= size <= 128 for size in sizes.values())
    assert Counter(prompt.category for prompt in held_out_prompts(8)) == dict.fromkeys(CATEGORIES, 8)
    assert max(prompt.request.count for prompt in training_prompts()) == 6


def test_no_set_of_objects_is_on_both_sides() -> None:
    """Neither with another relation, size or style, nor in another category."""

    def objects(request: Request) -> tuple[tuple[str, str, int], ...]:
        named = (*request.items, *request.absent)
        return tuple(sorted((item.shape, item.color or "", item.count) for item in named))

    training = {objects(prompt.request) for prompt in training_prompts(600)}
    held_out = {objects(prompt.request) for prompt in held_out_prompts(200)}
    assert training.isdisjoint(held_out) and len(training) > 800 and len(held_out) > 250


def test_a_seed_means_the_same_forever() -> None:
    texts = [prompt.text for prompt in training_prompts(16)]
    assert len(set(texts)) == len(texts) == 16 * len(CATEGORIES)
    assert zlib.crc32("\n".join(texts).encode()) == 523557899
    others = {prompt.text for prompt in training_prompts(16, seed=1)}
    assert len(others & set(texts)) < len(texts) / 2


def test_a_file_says_what_the_name_stands_for(tmp_path: Path) -> None:
    main(["shapes", "--out", str(tmp_path / "shapes"), "--per_category", "12"])
    assert sorted(path.name for path in (tmp_path / "shapes").iterdir()) == [
        "held_out.jsonl",
        "sheet.png",
        "train.jsonl",
    ]
    assert Image.open(tmp_path / "shapes" / "sheet.png").size == (1008, 832)
    for name, prompts in (("train", training_prompts(12)), ("held_out", held_out_prompts(12))):
        read = list(read_prompts(str(tmp_path / "shapes" / f"{name}.jsonl"), "data.prompts"))
        assert [(each.text, each.category) for each in read] == [(each.text, each.category) for each in prompts]
        assert [from_metadata(each.metadata) for each in read] == [each.request for each in prompts]
    built_in = load_training_prompts("shapes")
    assert built_in.prompts == [Prompt(p.text, p.category, to_metadata(p.request)) for p in training_prompts()]
    chances = Counter[str]()
    for prompt, weight in zip(built_in.prompts, built_in.weights.tolist(), strict=True):
        chances[prompt.category] += weight
    assert chances == {category: pytest.approx(1) for category in CATEGORIES}
    assert [prompt.category for prompt in load_eval_prompts("shapes", 1)] == list(CATEGORIES)
    assert check_prompts(DataConfig("shapes", "shapes"), load_reward("shapes").check) == []


def test_files_that_find_no_room_leave_nothing_and_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["shapes", "--out", str(tmp_path / "shapes"), "--per_category", "1"]

    def full(seed: int) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device", "sheet.png")

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="No space left"):
        patch.setattr("advflow.shapes.files.draw_sheet", full)
        main(words)
    assert not list(tmp_path.iterdir())
    main(words)
    assert len(list((tmp_path / "shapes").iterdir())) == 3


def test_a_line_is_that_of_geneval_and_more() -> None:
    request = Request((Item("circle", "red", size="small"), Item("star", count=2)), (Relation("inside", 0, 1),), "row")
    assert to_metadata(request) == {
        "include": [
            {"class": "circle", "count": 1, "color": "red", "size": "small", "position": ["inside", 1]},
            {"class": "star", "count": 2},
        ],
        "aligned": "row",
    }
    assert all(from_metadata(json.loads(each.to_json())) == each.request for each in training_prompts())


CIRCLE = {"class": "circle"}


@pytest.mark.parametrize(
    ("metadata", "sentence"),
    [
        ({}, '"include" is missing; accepted: a list of objects such as {"class": "circle", "count": 1}'),
        ({"include": "circle"}, "\"include\" is 'circle'; accepted: a list of objects"),
        ({"include": [{"class": "bench"}]}, "include[0].class is 'bench'; accepted: circle, square, triangle, star,"),
        ({"include": [{"count": 2}]}, "include[0].class is None; accepted: circle,"),
        ({"include": [CIRCLE | {"color": "cyan"}]}, "include[0].color is 'cyan'; accepted: red, orange,"),
        ({"include": [CIRCLE | {"count": 7}]}, "include[0].count is 7; accepted: 1 to 6"),
        ({"include": [CIRCLE | {"count": True}]}, "include[0].count is True; accepted: 1 to 6"),
        ({"include": [CIRCLE | {"size": "huge"}]}, "include[0].size is 'huge'; accepted: large, small"),
        ({"include": [CIRCLE], "aligned": "ring"}, "aligned is 'ring'; accepted: row, column, line"),
        ({"include": [CIRCLE], "exclude": [{"class": "dog"}]}, "exclude[0].class is 'dog'; accepted: circle,"),
        (
            {"include": [CIRCLE | {"position": ["left of", 0]}]},
            "include[0].position is ['left of', 0]; accepted: a pair such as [\"left of\", 1], with the number of",
        ),
        (
            {"include": [CIRCLE, CIRCLE | {"position": ["near", 0]}]},
            "include[1].position[0] is 'near'; accepted: left of, right of, above, below, inside",
        ),
        (
            {"include": [CIRCLE, CIRCLE | {"size": ["larger than", 2]}]},
            "include[1].size is ['larger than', 2]; accepted: a pair",
        ),
    ],
)
def test_metadata_that_says_nothing_is_named(metadata: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UnknownPrompt) as caught:
        load_reward("shapes").check(Prompt("a bench", metadata=metadata))
    assert str(caught.value).startswith(f"the reward 'shapes' cannot score 'a bench': {sentence}")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--per_category", "0"], "--per_category is 0; accepted: 1 or more"),
        (["--out", "."], "--out is '.'; accepted is a new folder in one that exists"),
    ],
)
def test_the_command_names_what_is_wrong(words: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["shapes", "--out", "nowhere", *words])
    assert str(caught.value) == f"advflow shapes: {message}"


@pytest.mark.parametrize("algorithm", ["advantage_flow", "flow_grpo"])
def test_the_config_goes_on_top_of_another(algorithm: str) -> None:
    words = resolve_configs(["train", "--config", "sd35_medium", "--config", "shapes", "--algorithm", algorithm])
    parser = train_parser()
    config = to_config(parser, parser.parse_args(words[1:]))
    assert config.data == DataConfig("shapes", "shapes", "shapes")
    assert (config.algorithm, config.model.resolution, config.evaluation.prompts_per_category) == (algorithm, 512, 32)


def test_a_run_on_them_learns_from_finite_rewards(tmp_path: Path) -> None:
    """The embedded pipeline was never told of stars; its images are scored all the same."""
    words = ["--config", "tiny", "--config", "shapes", "--evaluation.prompts_per_category", "1"]
    main(["train", *SMALL, *words, "--iterations", "2", "--out", str(tmp_path / "run")])
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["unscored_images"] for row in rows] == [0, 0] and all(0 <= row["reward"] <= 1 for row in rows)
    assert all(math.isfinite(row["loss"]) for row in rows)
    evaluated = json.loads((tmp_path / "run" / "evals.jsonl").read_text().splitlines()[0])
    assert list(evaluated["categories"]) == list(CATEGORIES)
