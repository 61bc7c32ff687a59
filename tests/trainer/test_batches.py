"""What is drawn, scored and counted does not depend on how many images are made at a time, nor on a score gone bad."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import advflow.processes.forward as forward_module
import pytest
import torch
from advflow.cli import main
from advflow.models.sd3 import SD3
from advflow.report import write_report
from advflow.rewards import Prompt, Scores
from advflow.run.checkpoint import checkpoints
from advflow.run.evaluate import finite_mean
from advflow.run.inference import draw_images, load_run
from advflow.run.log import EVALS, METRICS, to_json
from advflow.run.trainer import Trainer
from advflow.settings.config import TrainConfig
from advflow.settings.data import DataConfig, EvalConfig, RolloutConfig
from advflow.settings.processes import SDEConfig
from advflow.settings.sources import load_run_config

from tests.trainer.runs import OF_FLOWS, SMALL, rows, strict_json

Make = Callable[..., TrainConfig]
WINDOWS = {
    "first": SDEConfig(steps=2),
    "random": SDEConfig(window="random", steps=1, within=2, shared_noise=True),
    "sliding": SDEConfig(window="sliding", steps=1, sampler="cps"),
    "branch": SDEConfig(window="branch", steps=1, within=2, sampler="dance_sde"),
}


@pytest.fixture
def plain_velocity(monkeypatch: pytest.MonkeyPatch) -> None:
    """A velocity whose rounding knows no batch, so that latents can be compared bit by bit."""

    def velocity(self: SD3, transformer: Any, x: torch.Tensor, timestep: torch.Tensor, prompts: Any) -> torch.Tensor:
        return x * 0.5 + prompts.pooled.sum(1).view(-1, 1, 1, 1)

    monkeypatch.setattr(SD3, "velocity", velocity)


def _rollouts(small_config: Make, **changes: object) -> list[Any]:
    found = []
    for batch in (12, 5, 1):
        rollout = RolloutConfig(prompts=3, images_per_prompt=4, steps=3, batch=batch)
        found.append(Trainer(small_config(rollout=rollout, **changes)).roll_out(3)[0])
    return found


@pytest.mark.parametrize("window", WINDOWS)
def test_the_batch_of_a_rollout_changes_no_bit_of_what_is_drawn(
    small_config: Make, plain_velocity: None, window: str
) -> None:
    whole, *others = _rollouts(small_config, algorithm="flow_grpo", sde=WINDOWS[window])
    assert whole.transitions is not None
    for other in others:
        assert torch.equal(whole.x0, other.x0) and torch.equal(whole.transitions.eps, other.transitions.eps)
    eps = whole.transitions.eps.flatten(2)
    pairs = torch.cdist(eps[:, 0], eps[:, 0])
    pairs.fill_diagonal_(torch.inf)
    assert pairs.min() > 1  # every image has noise of its own


def test_images_of_different_iterations_share_no_noise(small_config: Make) -> None:
    trainer = Trainer(small_config(algorithm="flow_grpo", sde=WINDOWS["first"]))
    eps = [trainer.roll_out(iteration)[0].transitions.eps.flatten(2)[:, 0] for iteration in (0, 1)]  # type: ignore[union-attr]
    assert torch.cdist(*eps).min() > 1


@pytest.mark.parametrize("algorithm", OF_FLOWS)
def test_the_batch_of_a_rollout_changes_rounding_alone(small_config: Make, algorithm: str) -> None:
    whole, *others = _rollouts(small_config, algorithm=algorithm, sde=WINDOWS["first"])
    for other in others:
        torch.testing.assert_close(whole.x0, other.x0, rtol=1e-4, atol=1e-4)


def test_the_batch_changes_no_evaluation_and_no_sample(small_config: Make, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    main(["train", "--out", str(folder), *SMALL, "--iterations", "1"])
    config = load_run_config(str(folder))
    results, drawn = [], []
    for batch in (6, 4, 1):
        config.rollout.batch = batch
        results.append(Trainer(config).evaluate())
        drawn.append(draw_images(load_run(folder, config, base=False), "a red circle", 5, 2, seed=3))
    few = draw_images(load_run(folder, config, base=False), "a red circle", 2, 2, seed=3)
    for result, images in zip(results, drawn, strict=True):
        torch.testing.assert_close(results[0].images, result.images, rtol=1e-4, atol=1e-4)
        assert result.categories == results[0].categories
        torch.testing.assert_close(drawn[0], images, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(drawn[0][:2], few, rtol=1e-4, atol=1e-4)


class Told:
    """Answers with what it was told: `rewards` and `scores` map the place of an image since the start to a value."""

    calls: list[int] = []
    reward: Callable[[int], float] = staticmethod(lambda place: 0.1 * (place % 7))
    score: Callable[[int], float] = staticmethod(lambda place: 0.5)

    def __call__(self, images: torch.Tensor, prompts: list[Prompt]) -> Scores:
        first = sum(Told.calls)
        Told.calls.append(len(images))
        places = range(first, first + len(images))
        return Scores(torch.tensor([Told.reward(p) for p in places]), torch.tensor([Told.score(p) for p in places]))


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No call yet, and prompts whose first word is their category, which no line of a text file can say."""
    monkeypatch.setattr(Told, "calls", [])
    monkeypatch.setattr(
        "advflow.data.prompt_files.Prompt", lambda text, category=None: Prompt(text, category or text.split()[0])
    )
    return monkeypatch


def _prompts(tmp_path: Path) -> str:
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"{kind} {number}\n" for number in range(4) for kind in ("one", "two", "three")))
    return str(path)


def test_a_file_of_prompts_is_evaluated_in_batches_and_by_category(
    small_config: Make, tmp_path: Path, told: pytest.MonkeyPatch
) -> None:
    path = _prompts(tmp_path)
    for wanted, calls in ((1, [3]), (3, [8, 1]), (64, [8, 4])):
        told.setattr(Told, "calls", [])
        trainer = Trainer(
            small_config(
                data=DataConfig(path, path, f"{__name__}:Told"),
                evaluation=EvalConfig(every=2, steps=2, prompts_per_category=wanted),
            )
        )
        assert len(trainer.eval_prompts) == 3 * min(wanted, 4)
        assert [prompt.text for prompt in trainer.eval_prompts[:3]] == ["one 0", "two 0", "three 0"]
        kept = trainer.evaluate(keep=[2, 0])
        assert Told.calls == calls
        torch.testing.assert_close(kept.images, trainer.evaluate().images[[2, 0]])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_score_gone_bad_costs_itself_alone(
    small_config: Make, tmp_path: Path, told: pytest.MonkeyPatch, bad: float
) -> None:
    path = _prompts(tmp_path)
    trainer = Trainer(small_config(data=DataConfig(path, path, f"{__name__}:Told")))
    told.setattr(Told, "score", lambda place: bad if place in (1, 2, 5) else 0.25 * (place % 3))
    told.setattr(Told, "reward", lambda place: bad if place == 0 else float(place))
    result = trainer.evaluate()  # six prompts: one, two, three and again
    assert result.unscored == 3
    assert result.categories["one"] == 0.0 and result.categories["two"] == 0.25
    assert math.isnan(result.categories["three"])
    assert result.overall == 0.125 and result.reward == 3.0


def test_an_unscored_image_is_counted_and_not_learnt_from(
    small_config: Make, tmp_path: Path, told: pytest.MonkeyPatch
) -> None:
    path = _prompts(tmp_path)
    trainer = Trainer(small_config(data=DataConfig(path, path, f"{__name__}:Told")))
    told.setattr(Told, "reward", lambda place: {3: math.nan, 7: math.inf}.get(place, float(place)))
    rollout, row = trainer.roll_out(0)
    assert (row["unscored_images"], row["broken_images"]) == (2, 0)
    assert row["reward"] == pytest.approx((sum(range(12)) - 10) / 10)
    assert rollout.advantages.isnan().nonzero().flatten().tolist() == [3, 7]
    assert all(math.isfinite(value) for value in row.values())


WORDS = [*SMALL, "--data.reward", f"{__name__}:Told", "--evaluation.every", "100"]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rewards_that_are_all_bad_end_the_run(tmp_path: Path, told: pytest.MonkeyPatch, bad: float) -> None:
    folder = tmp_path / "run"
    told.setattr(Told, "reward", lambda place: bad)
    sentence = (
        r"no image of 3 iterations in a row could be learnt from: of 6 in the last one, number 3, 0 are not finite "
    )
    with pytest.raises(SystemExit, match=sentence + "and 6 got a reward from data.reward '.*:Told' that is not"):
        main(["train", "--out", str(folder), *WORDS, "--iterations", "9"])
    assert [row["reward"] for row in rows(folder, METRICS)] == [None] * 3
    assert len(checkpoints(folder / "checkpoints")) == 2 and not (folder / "summary.json").exists()


def test_images_that_are_all_broken_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, folder = forward_module.sample_latents, tmp_path / "run"
    monkeypatch.setattr(forward_module, "sample_latents", lambda *arguments: real(*arguments) * torch.nan)
    with pytest.raises(SystemExit, match="of 6 in the last one, number 3, 6 are not finite and 0 got a reward"):
        main(["train", "--out", str(folder), *SMALL, "--evaluation.every", "100", "--iterations", "9"])


def test_a_reward_that_works_now_and_then_ends_nothing(tmp_path: Path, told: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    told.setattr(Told, "reward", lambda place: float(place) if place >= 6 and (place // 6) % 3 == 0 else math.nan)
    main(["train", "--out", str(folder), *WORDS, "--iterations", "7"])
    unscored = [row["unscored_images"] for row in rows(folder, METRICS)]
    assert sorted(set(unscored)) == [0, 6] and unscored.count(0) == 2


def test_held_out_scores_that_are_all_bad_end_the_run(tmp_path: Path, told: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    told.setattr(Told, "score", lambda place: math.nan)
    with pytest.raises(
        SystemExit, match="data.reward '.*:Told' gave none of the 6 held-out images a finite score after"
    ):
        main(["train", "--out", str(folder), *WORDS, "--iterations", "1"])
    assert rows(folder, EVALS) == []
    told.setattr(Told, "score", lambda place: 0.5)
    main(["train", "--out", str(folder), "--resume"])
    told.setattr(Told, "score", lambda place: math.nan)
    with pytest.raises(SystemExit, match="gave none of the 6 images a finite score"):
        main(["eval", "--run", str(folder)])


def test_everything_written_is_json_and_the_report_reads_it(
    tmp_path: Path, told: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One category of the held-out prompts without a score, and one iteration without a reward."""
    folder = tmp_path / "run"
    told.setattr(Told, "reward", lambda place: math.nan if 6 <= place < 12 else float(place))
    told.setattr(Told, "score", lambda place: math.nan if place in (0, 18) else 0.5)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"{kind} 0\n" for kind in ("one", "two", "three", "four", "five", "six")))
    files = ["--data.prompts", str(prompts), "--data.eval_prompts", str(prompts)]
    main(["train", "--out", str(folder), *WORDS, *files, "--iterations", "2"])
    assert "one                - -> -" in capsys.readouterr().out
    summary = strict_json((folder / "summary.json").read_text())
    assert summary["final_score"] == 0.5 and summary["final_categories"]["one"] is None
    for name in (METRICS, EVALS):
        for line in (folder / name).read_text().splitlines():
            strict_json(line)
    assert [row["unscored"] for row in rows(folder, EVALS)] == [1, 1]
    assert rows(folder, METRICS)[0]["reward"] is None
    page = write_report(folder).read_text()
    assert "Held-out images without a finite score, left out of the means, in 2 of 2 evaluations" in page
    assert "Unscored images" in page


def test_json_has_null_where_there_is_no_number() -> None:
    row = {"a": math.nan, "b": {"c": math.inf, "d": -math.inf}, "e": 1.5, "f": None, "g": "nan"}
    assert strict_json(to_json(row)) == {"a": None, "b": {"c": None, "d": None}, "e": 1.5, "f": None, "g": "nan"}


def test_the_mean_of_what_is_finite() -> None:
    assert finite_mean(torch.tensor([1.0, math.nan, 3.0, math.inf])) == 2.0
    assert math.isnan(finite_mean(torch.tensor([math.nan])))
