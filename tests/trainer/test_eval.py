"""`advflow eval`: what it may change of a run's evaluation, and the folder of images it leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers", reason="the trainer's dependencies are not installed")

import advflow.run.inference as inference
from advflow.cli import main
from advflow.data.prompt import Prompt
from advflow.rewards.redness import Redness
from advflow.run.train import train
from advflow.settings.config import TrainConfig
from advflow.settings.data import EvalConfig, RolloutConfig
from advflow.settings.processes import DrawConfig
from PIL import Image


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("evaluated") / "run"
    config = TrainConfig(
        iterations=1,
        out=str(out),
        rollout=RolloutConfig(prompts=2, images_per_prompt=2, steps=1, batch=5),
        draws=DrawConfig(per_image=1),
        evaluation=EvalConfig(steps=1, prompts_per_category=2),
    )
    train(config, resume=False)
    return out


def test_every_image_is_kept_with_its_scores(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Twelve prompts in batches of five, and two rewards of which one has no part in the sum."""
    out = tmp_path / "scored"
    main(["eval", "--run", str(run), "--reward", "{redness: 1, embedded: 0}", "--out", str(out)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scored"]
    rows = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
    assert [row["image"] for row in rows] == [f"images/{index:06d}.png" for index in range(12)]
    assert len(list((out / "images").iterdir())) == 12
    for row in rows:
        pixels = torch.from_numpy(np.array(Image.open(out / row["image"]))).permute(2, 0, 1)[None] / 255
        redness = Redness()(pixels, [Prompt(row["prompt"])]).score.item()
        assert row["score"]["redness"] == row["reward"]["redness"] == pytest.approx(redness, abs=0.005)
        assert row["score"]["embedded"] in (0, 1)
    summary = json.loads((out / "summary.json").read_text())
    means = {
        category: np.mean([row["score"]["redness"] for row in rows if row["category"] == category])
        for category in dict.fromkeys(row["category"] for row in rows)
    }
    assert summary["categories"] == pytest.approx(means) and len(means) == 6
    assert summary["overall"] == pytest.approx(np.mean(list(means.values())))
    assert summary["images"] == 12 and summary["iteration"] == 1 and summary["run"] == str(run)
    assert summary["data"]["reward"] == {"redness": 1, "embedded": 0}
    assert f"overall {summary['overall']:.4f}" in capsys.readouterr().out


def test_it_scores_what_it_is_given(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another file of prompts, another reward, other steps."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        '{"prompt": "a red circle", "tag": "mine", "n": 3}\n{"prompt": "a blue square", "tag": "mine"}\n'
    )
    out = tmp_path / "scored"
    words = ["--eval_prompts", str(prompts), "--reward", "compressibility", "--steps", "2", "--out", str(out)]
    main(["eval", "--run", str(run), *words])
    rows = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
    assert [(row["prompt"], row["category"]) for row in rows] == [("a red circle", "mine"), ("a blue square", "mine")]
    assert rows[0]["metadata"]["n"] == 3 and all(row["score"]["compressibility"] < 0 for row in rows)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["evaluation"]["steps"] == 2 and summary["categories"].keys() == {"mine"}


def test_without_changes_it_is_the_runs_own_number(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["eval", "--run", str(run)])
    last = json.loads((run / "evals.jsonl").read_text().splitlines()[-1])
    assert f"overall {last['overall']:.4f}" in capsys.readouterr().out


def test_an_evaluation_that_fails_leaves_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def broken(self: Any, images: torch.Tensor, prompts: list[Prompt]) -> Any:
        calls.append(prompts)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(self, images, prompts)

    original = Redness.__call__
    monkeypatch.setattr(Redness, "__call__", broken)
    with pytest.raises(SystemExit, match="advflow eval: interrupted"):
        main(["eval", "--run", str(run), "--reward", "redness", "--out", str(tmp_path / "scored")])
    assert len(calls) == 2 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--steps", "0"], r"evaluation.steps is 0; accepted: 1 or more"),
        (["--prompts_per_category", "0"], r"evaluation.prompts_per_category is 0; accepted: >= 1"),
        (["--reward", "redish"], r"data.reward is 'redish'; did you mean 'redness'\?"),
        (["--reward", "{redness: 1, embedded: x}"], r"data.reward.embedded is 'x'; accepted: a weight, or a mapping"),
        (["--eval_prompts", "nowhere.txt"], r"data.eval_prompts is 'nowhere.txt', where there is no file"),
        (["--out", "."], r"--out is '.'; accepted is a new folder in one that exists"),
        (["--out", "no/such"], r"--out is 'no/such'; accepted is a new folder in one that exists"),
    ],
)
def test_a_mistake_is_a_sentence(
    words: list[str], sentence: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(inference, "make_policies", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(SystemExit, match=f"advflow eval: {sentence}"):
        main(["eval", "--run", str(run), *words])
    assert list(tmp_path.iterdir()) == []
