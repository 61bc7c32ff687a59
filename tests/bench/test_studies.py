"""The comparisons of docs/learning.md: what they run, and that its tables are those of their logs."""

from __future__ import annotations

import json
import re
import shlex
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("advflow", reason="the trainer is not installed")
pytest.importorskip("jsonargparse", reason="the trainer's dependencies are not installed")
pytest.importorskip("matplotlib", reason="pictures are drawn with matplotlib")

from advflow.dry_run.findings import Findings
from advflow.dry_run.prompts import look_at_prompts
from advflow.settings.config import TrainConfig
from advflow.settings.registry import REWARDS
from advflow.settings.sources import resolve_configs, to_config, train_parser

from bench.learning import document, study
from bench.learning.pictures import draw_front, draw_set, draw_spread
from bench.learning.studies import SEEDS, STUDIES, Study

ROOT = Path(__file__).resolve().parents[2]
ALL = [(settings, seed) for settings, seed in study.runs_of(STUDIES.values()) if seed == 0]


def config_of(settings: str) -> TrainConfig:
    words = resolve_configs(["train", *shlex.split(settings)])
    parser = train_parser()
    return to_config(parser, parser.parse_args(words[1:]))


def test_every_run_is_accepted_and_draws_as_many_images() -> None:
    of = {settings: each for each in STUDIES.values() for settings in each.rows.values()}
    prompts: dict[str, int] = {}
    for settings, of_settings in of.items():
        config, found = config_of(settings), Findings()
        candidates, rewards = config.capability.candidates or 0, tuple(config.data.rewards)
        assert config.iterations * (config.rollout.images + candidates) == of_settings.images, settings
        assert REWARDS.keys() >= set(rewards) and of_settings.rewards in ((), rewards), settings
        if config.data.prompts not in prompts:
            prompts[config.data.prompts] = look_at_prompts(config.data, 64, {True: [], False: []}, found)[0]
        assert prompts[config.data.prompts] >= max(config.rollout.prompts, candidates), settings


def test_nothing_is_trained_where_a_run_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(study, "_train", lambda *_: pytest.fail("a run was begun"))
    runs = [("--algorithm awm", 0), ("--data.reward gold --rollout.prompts 100000", 0)]
    assert study.train(runs, tmp_path, 1, "cpu") == 2
    assert "rollout.prompts is 100000; data.prompts has only" in (said := capsys.readouterr().err)
    assert "--resume: data.reward is 'gold'; accepted: 'embedded'" in said and not list(tmp_path.iterdir())


def test_what_is_looked_at_is_the_run_that_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the folder that `advflow train` takes by default, nor another device."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    (tmp_path / "runs" / "tiny" / "config.yaml").write_text("algorithm: flow_grpo\n")
    assert study.faults([study.words_of("--algorithm awm", 0, tmp_path, "cpu")]) == []
    (fault,) = study.faults([study.words_of("--algorithm awm", 0, tmp_path, "gpu")])
    assert "device is 'gpu'" in fault


def test_runs_of_two_devices_are_not_collected_as_one(tmp_path: Path) -> None:
    for seed, device in enumerate(("cpu", "cuda")):
        finished(tmp_path, seed, device, "abc")
    with pytest.raises(SystemExit, match="x: runs in .* are of cpu and cuda; accepted is one device"):
        study.collect("x", Study("", {"AWM": "--algorithm awm"}), tmp_path)


def test_no_result_names_a_folder_of_a_machine() -> None:
    for path in (ROOT / "bench" / "results").rglob("*.json"):
        assert not re.search(r"[\"=m](/work|/root|/home|/tmp)/", path.read_text()), path.name


def test_every_run_has_a_folder_of_its_own() -> None:
    folders = {study.folder_of(*run) for run in study.runs_of(STUDIES.values())}
    assert len(folders) == len(ALL) * len(SEEDS)
    assert all(folder.isascii() and "/" not in folder and " " not in folder for folder in folders)


def test_a_run_of_several_studies_is_trained_once() -> None:
    runs = list(study.runs_of(STUDIES.values()))
    assert len(runs) == len(set(runs)) < sum(len(each.rows) for each in STUDIES.values()) * len(SEEDS)
    assert [seed for _, seed in runs] == sorted(seed for _, seed in runs)


def test_only_what_is_missing_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = tmp_path / study.folder_of("--algorithm awm", 0)
    done.mkdir()
    (done / "summary.json").write_text("{}")
    trained: list[tuple[str, int]] = []

    def train(settings: str, seed: int, folder: Path, device: str) -> int:
        trained.append((settings, seed))
        return seed  # as if seed 1 failed

    monkeypatch.setattr(study, "_train", train)
    monkeypatch.setattr(study, "faults", lambda settings: [])
    assert study.train([("--algorithm awm", 0), ("--algorithm awm", 1)], tmp_path, 1, "cpu") == 1
    assert trained == [("--algorithm awm", 1)]


def finished(folder: Path, seed: int, device: str, commit: str | None) -> None:
    """What is collected of a run."""
    out = folder / study.folder_of("--algorithm awm", seed)
    out.mkdir()
    evaluation = {"iteration": 0, "images": 0, "overall": 0.123456789, "categories": {}}
    (out / "config.yaml").write_text(f"seed: {seed}\n")
    (out / "evals.jsonl").write_text(json.dumps(evaluation) + "\n")
    (out / "metrics.jsonl").write_text('{"grad_norm": 1.0, "reward": 0.5}\n')
    (out / "summary.json").write_text(json.dumps({"device": device, "commit": commit}))


def test_what_is_collected_names_the_commits_that_ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "RESULTS", tmp_path / "results")
    for seed, commit in enumerate(("abc", None, "abc")):
        finished(tmp_path, seed, "cpu", commit)
    study.collect("x", Study("", {"AWM": "--algorithm awm"}), tmp_path)
    found = json.loads((tmp_path / "results" / "x.json").read_text())
    assert found["environment"]["commit"] == "abc, unknown" and found["environment"]["torch"]
    assert [(each["label"], each["seed"], each["held_out"]) for each in found["runs"]] == [
        ("AWM", seed, [0.12346]) for seed in SEEDS
    ]


def run(label: str, seed: int, *held_out: float) -> dict[str, Any]:
    images = [128 * place for place in range(len(held_out))]
    rewards = {"embedded": list(held_out), "redness": [2 * score for score in held_out]}
    found = {"label": label, "seed": seed, "held_out": list(held_out), "images": images, "rewards": rewards}
    return found | {"of_set": {"fid": [1 - score for score in held_out]}}


RUNS = [run("worse", 0, 0.2, 0.3), run("worse", 1, 0.2, 0.2), run("better", 0, 0.2, 0.4), run("better", 1, 0.2, 0.6)]


def test_a_table_has_the_best_first_with_its_spread() -> None:
    assert document.table(Study("", {}), RUNS)[2:] == [
        "| better | 128 | 0.200 | +0.300 ± 0.141 | +0.200, +0.400 |",
        "| worse | 128 | 0.200 | +0.050 ± 0.071 | +0.100, +0.000 |",
    ]


def test_a_table_of_two_rewards_keeps_its_order() -> None:
    assert document.table(Study("", {}, ("embedded", "redness")), RUNS) == [
        "| | images | embedded | redness |",
        "|---|---|---|---|",
        "| before | 0 | 0.200 | 0.400 |",
        "| worse | 128 | 0.250 ± 0.071 | 0.500 ± 0.141 |",
        "| better | 128 | 0.500 ± 0.141 | 1.000 ± 0.283 |",
    ]


def test_a_table_of_sets_has_each_number_before_and_at_the_end() -> None:
    assert document.table(Study("", {}, of_set=("fid",)), RUNS) == [
        "| | images | score | fid |",
        "|---|---|---|---|",
        "| worse | 128 | 0.200 → 0.250 ± 0.071 | 0.800 → 0.750 ± 0.071 |",
        "| better | 128 | 0.200 → 0.500 ± 0.141 | 0.800 → 0.500 ± 0.141 |",
    ]


def test_a_table_goes_between_its_marks_and_nowhere_else() -> None:
    page = "a\n<!-- study x -->\nold\n<!-- /study x -->\nb"
    assert document.with_table(page, "x", ["new"]) == "a\n<!-- study x -->\nnew\n<!-- /study x -->\nb"
    with pytest.raises(ValueError, match="<!-- study y -->"):
        document.with_table(page, "y", ["new"])


def test_pictures_are_drawn(tmp_path: Path) -> None:
    draw_spread(RUNS, "title", tmp_path / "spread.png")
    draw_front(RUNS, ("embedded", "redness"), "title", tmp_path / "front.png")
    draw_set(RUNS, ("fid",), "title", tmp_path / "set.png")
    names = ("spread.png", "front.png", "set.png")
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in names)


def test_the_tables_of_the_page_are_those_of_the_logs() -> None:
    page = (ROOT / "docs" / "learning.md").read_text()
    for path in study.RESULTS.glob("*.json"):
        found = json.loads(path.read_text())["runs"]
        rows = document.table(STUDIES[path.stem], found)
        assert document.with_table(page, path.stem, rows) == page, path.stem


def test_the_logs_are_of_the_runs_of_today() -> None:
    for path in study.RESULTS.glob("*.json"):
        seeds = defaultdict(set)
        for each in json.loads(path.read_text())["runs"]:
            assert STUDIES[path.stem].rows[each["label"]] == each["arguments"]
            seeds[each["label"]].add(each["seed"])
        assert all(found == set(SEEDS) for found in seeds.values()), path.stem
