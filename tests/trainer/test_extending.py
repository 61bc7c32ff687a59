"""docs/extending.md: its files are written down as they stand there, and its commands run."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from advflow.algorithms import check_settings
from advflow.algorithms.batch import ForwardBatch, Needs
from advflow.cli import main
from advflow.run.checkpoint import checkpoints
from advflow.settings.config import TrainConfig, config_class
from advflow.settings.registry import FAMILIES, METHODS, REWARDS, SAMPLERS, STOCHASTIC_SAMPLERS, Choice, Method
from advflow.settings.sources import load_run_config

from tests.trainer.runs import SMALL

DOCUMENT = (Path(__file__).resolve().parents[2] / "docs/extending.md").read_text(encoding="utf-8")
FILES: dict[str, str] = dict(re.findall(r"`(\w+)\.py`:\n\n```python\n(.*?)```", DOCUMENT, re.DOTALL))
COMMANDS: list[str] = [
    line for block in re.findall(r"```\n(advflow.*?)```", DOCUMENT, re.DOTALL) for line in block.splitlines()
]
LISTS = (METHODS, REWARDS, SAMPLERS, STOCHASTIC_SAMPLERS, FAMILIES)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with the document's files in it; what they have added is taken out again."""
    for name, text in FILES.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = [dict(each) for each in LISTS]
    yield tmp_path
    for each, names in zip(LISTS, before, strict=True):
        for name in each.keys() - names.keys():
            del each[name]
    for name in FILES:
        sys.modules.pop(name, None)


def _words(command: str) -> list[str]:
    return [
        word
        for part in shlex.split(command)[1:]
        for word in (SMALL + ["--iterations", "2"] if part == "SMALL" else [part])
    ]


def test_the_document_has_one_of_each() -> None:
    assert set(FILES) == {"my_method", "my_reward", "my_sampler", "my_steps", "my_family"}
    assert all(any(f"--plugins {name} " in command for command in COMMANDS) for name in FILES)


@pytest.mark.parametrize("name", FILES)
def test_what_is_written_runs(folder: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Trains, keeps the settings with the run, and is found again by the commands that name the run alone."""
    first = next(i for i, command in enumerate(COMMANDS) if f"--plugins {name} " in command)
    mine = [COMMANDS[first], *(c for c in COMMANDS[first + 1 :] if _run_of(c) == _run_of(COMMANDS[first]))]
    for command in mine:
        main(_words(command))
    run = folder / _run_of(COMMANDS[first])
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["plugins"] == [name]
    assert json.loads((run / "summary.json").read_text())["iterations"] == 2
    assert len(checkpoints(run / "checkpoints")) == 2 and (run / "report.html").is_file()
    option = re.search(r"--(above_mean|bright|fading|pixels)\.(\w+) (\S+)", COMMANDS[first])
    if option:
        assert saved[option[1]] == {option[2]: json.loads(option[3])}
        assert asdict(load_run_config(str(run)))[option[1]] == saved[option[1]]


def _run_of(command: str) -> str:
    words = shlex.split(command)
    return next(
        words[i + 1] for i, word in enumerate(words) if word in ("--run",) or (word == "--out" and "--run" not in words)
    )


def _command(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "advflow", *words], cwd=folder, capture_output=True, text=True)


def test_a_plugins_settings_are_in_the_help_and_checked(folder: Path) -> None:
    text = _command(folder, "train", "--plugins", "my_method,my_family", "--help").stdout
    assert "--above_mean.anchor ANCHOR" in text and "pull towards the rollout policy" in text
    assert "--pixels.width WIDTH" in text and "--bright.channel" not in text
    flat = re.sub(r"\s+", "", text)
    assert (
        "'token_grpo','above_mean'" in flat and "--model.family{sd3,llamagen,pixels}" in flat and "{euler,dpm}" in flat
    )


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            "--plugins my_method --above_mean.anchor -1",
            "above_mean.anchor is -1.0; accepted: zero or a positive number",
        ),
        ("--plugins my_method --above_mean.anchor=much", "above_mean.anchor is 'much'; accepted: a number"),
        (
            "--plugins my_method --above_mean.ancor 1",
            "there is no option --above_mean.ancor; did you mean '--above_mean.",
        ),
        ("--plugins my_method --algorithm above_men", "algorithm is 'above_men'; did you mean 'above_mean'?"),
        ("--plugins my_method --above_mean.anchor 1e300", "above_mean.anchor is 1e+300; accepted: a finite number"),
        ("--algorithm above_mean", "algorithm is 'above_mean'"),
        ("--plugins my_methd", "plugins holds 'my_methd', and there is no module 'my_methd'"),
        ("--plugins my/method.py", "plugins holds 'my/method.py'; accepted: modules by their names, as in an import"),
        (
            "--plugins my_reward --data.reward bright --data.reward_args.x 1",
            "the reward 'bright' has its settings in br",
        ),
        (
            "--plugins my_family --model.family pixels --model.trainable lora",
            "model.trainable is 'lora'; accepted: 'full' where",
        ),
    ],
)
def test_what_is_wrong_is_a_sentence(
    folder: Path, words: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["train", "--out", "run", *words.split()])
    said = f"{caught.value} {capsys.readouterr().err}"
    assert sentence in said and "Traceback" not in said
    assert not (folder / "run").exists()


def test_a_run_that_goes_on_knows_its_plugins(folder: Path) -> None:
    first = ["train", "--plugins", "my_method,my_sampler", "--rollout.solver", "heun", "--above_mean.anchor", "0.5"]
    main([*first, "--out", "run", *SMALL, "--iterations", "1"])
    same = ["--above_mean.anchor", "0.5", "--rollout.solver", "heun"]
    done = _command(folder, "train", "--out", "run", "--resume", "--iterations", "2", *same)
    assert done.returncode == 0, done.stderr
    done = _command(folder, "train", "--out", "run", "--resume", "--iterations", "2", "--above_mean.anchor", "1")
    assert "above_mean.anchor is 1.0 and was 0.5; --resume may change" in done.stderr


def test_a_file_of_settings_names_plugins_too(folder: Path) -> None:
    (folder / "mine.yaml").write_text("plugins: [my_method]\nalgorithm: above_mean\nabove_mean:\n  anchor: 0.5\n")
    main(["train", "--config", "mine.yaml", "--out", "run", *SMALL, "--iterations", "1"])
    config = load_run_config("run")
    assert (config.plugins, config.algorithm, config.method.anchor) == (["my_method"], "above_mean", 0.5)


def test_what_a_plugin_raises_keeps_its_traceback(folder: Path) -> None:
    (folder / "my_broken_plugin.py").write_text("raise ValueError('boom when imported')\n")
    (folder / "my_other_plugin.py").write_text("import something_that_is_not_there\n")
    with pytest.raises(ValueError, match="boom when imported"):
        main(["train", "--plugins", "my_broken_plugin"])
    with pytest.raises(ModuleNotFoundError, match="something_that_is_not_there"):
        main(["train", "--plugins", "my_other_plugin"])


def test_a_name_that_is_taken_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="'awm' is there already"):
        METHODS.add("awm", Method("a:B"))
    with pytest.raises(ValueError, match="'a-b' cannot be chosen by name"):
        REWARDS.add("a-b", Choice("a:B"))
    REWARDS.add("optim", Choice("a:B", dict))
    with pytest.raises(ValueError, match="the settings of 'optim' would stand in optim, which is there already"):
        config_class()


def test_a_method_without_settings_is_checked_too(folder: Path) -> None:
    class Refuses:
        needs = Needs(old=False, reference=False)

        def loss(self, batch: ForwardBatch) -> None:
            raise ValueError("weights are negative")

    METHODS.add("refuses", Method(Refuses))
    with pytest.raises(ValueError, match="refuses: weights are negative"):
        check_settings("refuses", config_class()(algorithm="refuses").method, group_size=4)


def test_without_plugins_nothing_is_added() -> None:
    assert config_class() is TrainConfig
