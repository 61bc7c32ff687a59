"""`--resume` continues the run that is there: its settings, its bits, and nobody else at the same time."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from advflow.cli import _parse, main
from advflow.run.folder import MAY_CHANGE, FolderLock, check_folder, write_config
from advflow.run.log import EVALS, METRICS
from advflow.run.trainer import Trainer
from advflow.settings.config import TrainConfig
from advflow.settings.data import DataConfig
from advflow.settings.methods import AdvantageFlowConfig
from advflow.settings.model import RuntimeConfig
from advflow.settings.numbers import flatten
from advflow.settings.sources import load_run_config, to_config, train_parser

from tests.trainer.runs import SMALL, assert_same_run, files, rows

OTHER: dict[str, Any] = {  # another valid value of settings that have few
    "algorithm": "awm",
    "optim.betas": [0.5, 0.9],
    "model.lora_targets": ["attn.to_q"],
    "advantage_flow.gamma": "1-A",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three iterations with a gamma of its own."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    main(["train", "--out", str(folder), *SMALL, "--iterations", "3", "--advantage_flow.gamma", "1-A"])
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(finished, tmp_path / "run")


def _stop_in(iteration: int, monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    """Runs `words` as if they were killed in an iteration, counted from 0."""
    iterate = Trainer.iterate

    def killed(self: Trainer, number: int) -> dict[str, float]:
        if number == iteration:
            raise KeyboardInterrupt
        return iterate(self, number)

    with monkeypatch.context() as patch, pytest.raises((SystemExit, KeyboardInterrupt)):
        patch.setattr(Trainer, "iterate", killed)
        main(words)


def test_a_run_goes_on_with_its_own_settings(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """README's example: neither gamma nor anything else is named again."""
    folder = tmp_path / "run"
    first = ["train", "--out", str(folder), *SMALL, "--iterations", "3", "--advantage_flow.gamma", "1-A"]
    _stop_in(2, monkeypatch, first)
    config = (folder / "config.yaml").read_bytes()
    main(["train", "--out", str(folder), "--resume"])
    assert (folder / "config.yaml").read_bytes() == config
    assert load_run_config(str(folder)).advantage_flow.gamma == "1-A"
    assert_same_run(finished, folder)


def test_every_changed_setting_is_named_and_refused(tmp_path: Path) -> None:
    config = TrainConfig(out=str(tmp_path))
    write_config(config)
    settings = flatten(asdict(config))
    for name, value in settings.items():
        if isinstance(value, bool):
            new: Any = not value
        elif isinstance(value, int | float):
            new = value + 1
        else:
            new = OTHER.get(name, "another")
        text = flatten(asdict(config)) | {name: new}
        changed = yaml.safe_dump(_nested(text))
        (tmp_path / "config.yaml").write_text(changed)
        if name in MAY_CHANGE:
            check_folder(config, resume=True)
        else:
            with pytest.raises(ValueError, match=rf"{name} is .* and was .*; --resume may change iterations, out, "):
                check_folder(config, resume=True)


@pytest.mark.parametrize(
    ("was", "now"),
    [
        ({"redness": 1.0}, {"redness": 1.0, "compressibility": None}),
        ({"redness": 1.0}, {"redness": 1.0, "compressibility": {"args": {}}}),
        ({"redness": 1.0, "compressibility": {}}, {"redness": 1.0}),
        ({"redness": {}}, "embedded"),
        ("embedded", {"redness": {}}),
        ({"redness": {}}, {"redness": 2}),
        ({"redness": {"args": {"a": None}}}, {"redness": {"args": {}}}),
        ({"redness": {"batch": 3}}, {"redness": {}}),
        ({"a": {"reward": "redness"}}, {"a": {"reward": "embedded"}}),
    ],
)
def test_a_changed_reward_is_refused(was: Any, now: Any, tmp_path: Path) -> None:
    write_config(TrainConfig(out=str(tmp_path), data=DataConfig(reward=was)))
    sentence = f"other settings: data.reward is {now!r} and was {was!r}; --resume may"
    with pytest.raises(ValueError, match=re.escape(sentence)):
        check_folder(TrainConfig(out=str(tmp_path), data=DataConfig(reward=now)), resume=True)


@pytest.mark.parametrize(
    ("was", "now"),
    [
        ({"redness": {}}, {"redness": {}}),
        ({"redness": None}, {"redness": {"weight": 1.0, "args": {}}}),
        ({"redness": 1}, "redness"),
        ("redness", {"redness": {"reward": "redness"}}),
        ({"a": {"reward": "redness"}, "redness": 0}, {"a": {"reward": "redness", "weight": 1}, "redness": 0.0}),
    ],
)
def test_a_reward_in_other_words_is_the_same(was: Any, now: Any, tmp_path: Path) -> None:
    write_config(TrainConfig(out=str(tmp_path), data=DataConfig(reward=was)))
    check_folder(TrainConfig(out=str(tmp_path), data=DataConfig(reward=now)), resume=True)


def test_an_argument_of_a_reward_that_is_null_is_one(tmp_path: Path) -> None:
    write_config(TrainConfig(out=str(tmp_path)))
    changed = TrainConfig(out=str(tmp_path), data=DataConfig(reward_args={"model": None}))
    with pytest.raises(ValueError, match=r"data.reward_args is \{'model': None\} and was \{\}; "):
        check_folder(changed, resume=True)


def test_a_run_that_says_less_has_the_defaults_and_one_that_says_more_is_another(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(f"out: {tmp_path}\ndata:\noptim: {{lr: {TrainConfig().optim.lr}}}\n")
    check_folder(TrainConfig(out=str(tmp_path)), resume=True)
    (tmp_path / "config.yaml").write_text(f"out: {tmp_path}\noptim: {{gone: null}}\n")
    with pytest.raises(ValueError, match=r"other settings: optim.gone is no setting and was None; "):
        check_folder(TrainConfig(out=str(tmp_path)), resume=True)


def test_a_run_with_cuda_graphs_goes_on_in_parts_without_them_and_one_that_merges_all_does_not(tmp_path: Path) -> None:
    """What docs/data-parallel.md says."""
    folder = str(tmp_path)

    def resumed(*words: str) -> None:
        arguments = _parse(["train", "--out", folder, "--resume", "--runtime.shard", "true", *words]).train
        for name in ("resume", "config"):
            arguments.pop(name)
        check_folder(to_config(train_parser(), arguments), resume=True)

    write_config(TrainConfig(out=folder, runtime=RuntimeConfig(cuda_graphs=True)))
    with pytest.raises(ValueError, match="runtime.cuda_graphs is True, with runtime.shard"):
        resumed()
    resumed("--runtime.cuda_graphs", "false")
    write_config(TrainConfig(out=folder, runtime=RuntimeConfig(merge_lora="all")))
    with pytest.raises(ValueError, match="runtime.merge_lora is 'images' and was 'all'; --resume may change"):
        resumed("--runtime.merge_lora", "images")


def _nested(flat: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *sections, last = name.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return tree


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--advantage_flow.gamma", "1.1"], "advantage_flow.gamma is 1.1 and was '1-A'"),
        (["--config", "tiny"], "advantage_flow.gamma is 1.1 and was '1-A'"),
        (["--config", "sd35_medium"], "model.pipeline is 'stabilityai/stable-diffusion-3.5-medium' and was 'embedded'"),
        (["--algorithm", "awm", "--iterations", "9"], "algorithm is 'awm' and was 'advantage_flow'"),
        (["--seed=1"], "seed is 1 and was 0"),
        (["--iterations", "2"], "iterations is 2; the run in .* has done 3"),
        (["--data.prompts", "nowhere.txt"], "data.prompts is 'nowhere.txt'"),
        (["--optim.lr", "0"], "optim.lr is 0"),
        (["--device", "warp9"], "device is 'warp9'"),
    ],
)
def test_a_refused_resume_changes_no_file(run: Path, words: list[str], message: str) -> None:
    before = files(run)
    with pytest.raises(SystemExit, match=message):
        main(["train", "--out", str(run), "--resume", *words])
    assert files(run) == before


def test_a_checkpoint_that_does_not_fit_changes_no_file(run: Path) -> None:
    """Another model's checkpoint is found out only after the model has been loaded."""
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("trainable: full", "trainable: lora"))
    before = files(run)
    with pytest.raises(SystemExit, match="does not fit this run"):
        main(["train", "--out", str(run), "--resume", "--iterations", "4"])
    assert files(run) == before


def test_what_may_change_is_taken_and_written_down(run: Path) -> None:
    words = "--iterations 4 --checkpoint_every 7 --evaluation.every 9 --device cpu --advantage_flow.gamma 1-A".split()
    main(["train", "--out", str(run), "--resume", *words])
    config = load_run_config(str(run))
    assert (config.iterations, config.checkpoint_every, config.evaluation.every, config.device) == (4, 7, 9, "cpu")
    assert config.advantage_flow == AdvantageFlowConfig(gamma="1-A")
    assert [row["iteration"] for row in rows(run, METRICS)] == [0, 1, 2, 3]
    assert [row["iteration"] for row in rows(run, EVALS)] == [0, 1, 2, 3, 4]


def test_a_finished_run_stays_what_it_is(run: Path) -> None:
    main(["train", "--out", str(run), "--resume"])  # its config.yaml now says where it is
    before = files(run)
    main(["train", "--out", str(run), "--resume"])
    assert files(run) == before


def test_a_run_that_was_moved_goes_on_where_it_is(run: Path, tmp_path: Path) -> None:
    moved = run.rename(tmp_path / "elsewhere")
    main(["train", "--out", str(moved), "--resume", "--iterations", "4"])
    assert not run.exists() and len(rows(moved, METRICS)) == 4
    assert load_run_config(str(moved)).out == str(moved)


def test_resume_where_there_is_no_run_starts_one(tmp_path: Path) -> None:
    """What `make demo` does."""
    folder = tmp_path / "new"
    main(["train", "--config", "tiny", "--seed", "0", "--out", str(folder), "--resume", *SMALL, "--iterations", "1"])
    assert load_run_config(str(folder)).iterations == 1 and len(rows(folder, METRICS)) == 1
    main(["train", "--config", "tiny", "--seed", "0", "--out", str(folder), "--resume", *SMALL, "--iterations", "1"])


def test_a_run_is_not_overwritten(run: Path) -> None:
    before = files(run)
    with pytest.raises(SystemExit, match="where a run already is; give --resume or another --out"):
        main(["train", "--out", str(run), *SMALL])
    assert files(run) == before


def test_one_process_at_a_time(run: Path) -> None:
    before = files(run)
    with FolderLock(run) as lock:
        lock.take()
        with pytest.raises(SystemExit, match=rf"where process {os.getpid()} on .* is training; accepted is one"):
            main(["train", "--out", str(run), "--resume"])
    assert files(run) == before


def test_what_a_killed_process_leaves_locks_nobody_out(run: Path) -> None:
    (run / ".lock").write_text("process 1 on another machine")
    main(["train", "--out", str(run), "--resume"])
    assert not (run / ".lock").exists()


def test_two_new_runs_in_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both found no run there and loaded their model; the slower one leaves the faster one's alone."""
    folder, load = tmp_path / "run", Trainer.__init__

    def overtaken(self: Trainer, *arguments: Any) -> None:
        load(self, *arguments)
        if not folder.exists():
            folder.mkdir()
            write_config(replace(TrainConfig(), out=str(folder), seed=7))

    monkeypatch.setattr(Trainer, "__init__", overtaken)
    with pytest.raises(SystemExit, match="where a run already is"):
        main(["train", "--out", str(folder), "--resume", *SMALL])
    assert load_run_config(str(folder)).seed == 7 and list(folder.iterdir()) == [folder / "config.yaml"]
