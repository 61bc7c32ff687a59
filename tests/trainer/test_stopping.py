"""Signals: an answer at once, an end within one batch, a saved state, and the same bits afterwards."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from advflow.cli import main
from advflow.rewards import Prompt, Scores
from advflow.run.checkpoint import checkpoints
from advflow.run.log import EVALS, METRICS
from advflow.run.run import Run
from advflow.run.trainer import Trainer

from tests.trainer.runs import SMALL, assert_same_run, rows


@pytest.fixture(autouse=True)
def interrupts_count() -> Iterator[None]:
    """Also where the tests themselves run in the background of a script, which ignores SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Red:
    """Scores by redness. `calls` holds how many images each call had; `at` may do something in one of them."""

    calls: list[int] = []
    at: dict[int, Any] = {}

    def __call__(self, images: torch.Tensor, prompts: list[Prompt]) -> Scores:
        Red.calls.append(len(images))
        Red.at.get(len(Red.calls), lambda: None)()
        red = images[:, 0].mean((1, 2)).cpu()
        return Scores(red, red)


@pytest.fixture(autouse=True)
def _no_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Red, "calls", [])
    monkeypatch.setattr(Red, "at", {})


WORDS = [*SMALL, "--iterations", "3", "--evaluation.every", "2", "--data.reward", f"{__name__}:Red"]
# Six held-out prompts in batches of 4 are two calls, and so are the six images of a rollout: calls 1 and 2 are the
# evaluation of the base, 3 to 6 rollouts, 7 and 8 an evaluation, 9 and 10 the third rollout, 11 and 12 the evaluation
# after it.


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    main(["train", "--out", str(folder), *WORDS])
    return folder


def _send(number: signal.Signals) -> Any:
    return lambda: signal.raise_signal(number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    ("call", "calls", "done", "answer"),
    [
        (1, 1, 0, 1),  # the evaluation of the base
        (7, 7, 2, 2),  # an evaluation along the way
        (11, 11, 3, 3),  # the last one
        (4, 4, 1, 1),  # scoring the last batch of a rollout: there the iteration is finished
    ],
)
def test_a_signal_stops_within_one_batch(
    whole: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    number: signal.Signals,
    call: int,
    calls: int,
    done: int,
    answer: int,
) -> None:
    folder = tmp_path / "run"
    Red.at[call] = _send(number)
    with pytest.raises(SystemExit) as caught:
        main(["train", "--out", str(folder), *WORDS])
    assert caught.value.code not in (0, None)
    assert len(Red.calls) == calls and max(Red.calls) <= 4
    assert f"{number.name}: finishing iteration {answer}:" in capfd.readouterr().err
    names = [path.name for path in checkpoints(folder / "checkpoints")]
    if done:
        assert f"stopped after iteration {done}, saved; go on with --resume" in str(caught.value)
        assert names[-1] == f"{done:06d}"
    else:
        assert "stopped before the first iteration was done; --resume starts it again" in str(caught.value)
        assert names == []
    assert len(rows(folder, METRICS)) == done
    main(["train", "--out", str(folder), "--resume"])
    assert_same_run(whole, folder)


def test_a_signal_in_a_rollout_ends_it(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two batches: the state before the iteration is saved, though none was due, and the rollout made again."""
    folder, sample, drawn = tmp_path / "run", Trainer._sample, []

    def interrupted(self: Trainer, noise: torch.Tensor, embeddings: Any, iteration: int, *more: Any) -> Any:
        drawn.append(iteration)
        if iteration == 1 and len(drawn) == 2:
            signal.raise_signal(signal.SIGTERM)
        return sample(self, noise, embeddings, iteration, *more)

    monkeypatch.setattr(Trainer, "_sample", interrupted)
    with pytest.raises(SystemExit, match="stopped after iteration 1, saved"):
        main(["train", "--out", str(folder), *WORDS, "--checkpoint_every", "3"])
    assert [path.name for path in checkpoints(folder / "checkpoints")] == ["000001"]
    assert Red.calls == [4, 2, 4, 2]
    main(["train", "--out", str(folder), "--resume", "--checkpoint_every", "1"])
    assert drawn == [0, 1, 1, 2]
    assert_same_run(whole, folder)


def test_what_was_ignored_stays_so(tmp_path: Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Red.at[3] = lambda: signal.raise_signal(signal.SIGINT)
    main(["train", "--out", str(tmp_path / "run"), *WORDS])
    assert (tmp_path / "run/summary.json").exists() and signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    def twice() -> None:
        for _ in range(2):  # raised in this thread: of two sent to the process, the second may be lost in the first
            signal.raise_signal(signal.SIGINT)
        pytest.fail("went on after the second one")

    Red.at[3] = twice
    with pytest.raises(SystemExit, match="advflow train: interrupted"):
        main(["train", "--out", str(tmp_path / "run"), *WORDS])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_state_is_saved_before_it_is_evaluated(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reward that fails in an evaluation costs the evaluation: nothing that was learnt."""
    folder, evaluate = tmp_path / "run", Run._evaluate

    def fails(self: Run) -> str:
        if self._done == 2:
            raise RuntimeError("the reward's server is away")
        return evaluate(self)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="server is away"):
        patch.setattr(Run, "_evaluate", fails)
        main(["train", "--out", str(folder), *WORDS, "--checkpoint_every", "100"])
    assert [path.name for path in checkpoints(folder / "checkpoints")] == ["000002"]
    assert [row["iteration"] for row in rows(folder, EVALS)] == [0]
    main(["train", "--out", str(folder), "--resume"])
    assert_same_run(whole, folder)
