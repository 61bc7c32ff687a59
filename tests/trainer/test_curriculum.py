"""AdaGRPO in the trainer: which prompts are kept, what their advantages are, and that nothing else changes."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from advflow.cli import main
from advflow.control.capability import Curriculum
from advflow.run.log import EVALS, METRICS
from advflow.run.trainer import Trainer
from advflow.settings.capability import CapabilityConfig
from advflow.settings.config import TrainConfig
from advflow.settings.data import AdvantageConfig
from advflow.settings.processes import SDEConfig

import advflow_ext as af
from tests.trainer.runs import SMALL, assert_same_run, rows, stop_at_batch

Make = Callable[..., TrainConfig]
NAN = float("nan")
SCORES = torch.tensor([0.0, 0.3, NAN, 1.0, 0.5, 0.2])  # mean 0.4, median 0.3
OF_CURRICULUM = (
    "candidate_reward", "unscored_candidates", "capability_mean", "capability_std", "kept_distance",
    "two_sided_groups", "sign_flips",
)  # fmt: skip


def curriculum(kept: int = 2, advantage: AdvantageConfig | None = None, **settings: object) -> Curriculum:
    config = CapabilityConfig(candidates=6, **settings)  # type: ignore[arg-type]
    return Curriculum(config, kept, 4, advantage or AdvantageConfig())


@pytest.mark.parametrize(
    ("select", "kept"),
    [("ema", [1, 4]), ("medium", [1, 5]), ("easiest", [3, 4]), ("hardest", [0, 5]), ("random", [0, 1])],
)
def test_each_rule_keeps_its_prompts_in_their_order(select: str, kept: list[int]) -> None:
    assert curriculum(select=select).choose(SCORES) == kept
    assert curriculum(kept=6, select=select).choose(SCORES) == list(range(6))
    if select != "random":
        assert 2 not in curriculum(kept=5, select=select).choose(SCORES)  # what has no score comes last


def test_the_moving_average_and_what_is_logged_of_it() -> None:
    ours = curriculum(decay=0.5)
    ours.choose(SCORES)
    _, first = ours.fuse(torch.zeros(4), torch.zeros(4))
    assert first["capability_mean"] == pytest.approx(0.4) and first["unscored_candidates"] == 1
    std = math.sqrt((0.16 + 0.01 + 0.36 + 0.01 + 0.04) / 5)
    assert first["capability_std"] == pytest.approx(std) and first["kept_distance"] == pytest.approx(0.1 / std)
    ours.choose(SCORES - 0.2)
    _, second = ours.fuse(torch.zeros(4), torch.zeros(4))
    assert second["capability_mean"] == pytest.approx(0.3) and second["candidate_reward"] == pytest.approx(0.2)


def test_what_was_seen_counts_once_the_rollout_is_there() -> None:
    """A rollout that is interrupted is made again: its candidates must not count twice."""
    whole, interrupted = curriculum(), curriculum()
    for ours in (whole, interrupted):
        ours.choose(SCORES)
        ours.fuse(torch.zeros(4), torch.zeros(4))
    before = interrupted.state_dict()
    interrupted.choose(SCORES + 1)
    assert interrupted.state_dict() == before
    for ours in (whole, interrupted):
        ours.choose(SCORES + 1)
        ours.fuse(torch.zeros(4), torch.zeros(4))
    assert whole.state_dict() == interrupted.state_dict() != before


def test_no_scored_candidate_is_no_curriculum() -> None:
    ours, own = curriculum(), torch.tensor([0.5, -0.5, 0.0, 0.0])
    assert ours.choose(torch.full((6,), NAN)) == [0, 1]
    advantages, row = ours.fuse(torch.tensor([1.0, 0.0, 0.5, 0.5]), own)
    assert torch.equal(advantages, own) and row["unscored_candidates"] == 6


def test_advantages_are_fused_in_their_own_unit_and_kept_in_their_bound() -> None:
    rewards = torch.tensor([0.0, 0.25, 0.375, 1.0, 1.0, 1.0, 1.0, 1.0])  # capability 0.4: two below it twice, then none
    unit = {"clip": 1.0, "clip_divide": 0.5}
    for mode, scale in unit.items():
        choice = AdvantageConfig(norm="group_std", clip=2.0, clip_mode=mode)  # type: ignore[arg-type]
        ours = curriculum(advantage=choice, weight=0.7)
        ours.choose(SCORES)
        own = scale * af.group_advantages(rewards, 4, norm="group_std", clip=2.0)
        fused, row = ours.fuse(rewards, own)
        state = ours.state_dict()
        out = af.cross_level_advantages(rewards, 4, mean=state["mean"], variance=state["variance"])
        summed = own + 0.7 * scale * out.calibrated
        torch.testing.assert_close(fused, summed * (2 * scale / summed.max()))
        assert fused[3] == 2 * scale and not fused[4:].any()
        assert fused[:4].sum().item() == pytest.approx(0, abs=1e-6)
        assert row["two_sided_groups"] == 0.5 and row["sign_flips"] == 0
    same, _ = ours.fuse(rewards, own)
    torch.testing.assert_close(same, fused)


def test_candidates_that_all_score_the_same_leave_the_groups_own_advantages() -> None:
    """There is no deviation to measure a reward in; a next to none is, and no group's sum is cut off."""
    rewards, choice = torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0]), AdvantageConfig()
    own = af.group_advantages(rewards, 4, norm=choice.norm, clip=choice.clip, clip_mode=choice.clip_mode)
    ours = curriculum(advantage=choice)
    ours.choose(torch.zeros(6))
    fused, row = ours.fuse(rewards, own)
    assert torch.equal(fused, own) and row["sign_flips"] == 0
    nearly = curriculum(advantage=choice)
    nearly.choose(torch.tensor([0.0, 0.001, 0.0, 0.0, 0.0, 0.0]) - 0.01)
    fused, _ = nearly.fuse(rewards, own)
    third = 1 / 3
    torch.testing.assert_close(fused, torch.tensor([-third, 1.0, -third, -third, -1.0, -1.0, 1.0, 1.0]))


def test_softmax_advantages_are_fused_in_one_deviation_and_kept_within_3() -> None:
    rewards = torch.tensor([0.0, 0.25, 0.375, 1.0, 0.6, 1.0, 1.0, 1.2])
    own = af.softmax_advantages(rewards, 4)
    for weight in (0.7, 70.0):
        ours = curriculum(advantage=AdvantageConfig(norm="softmax"), weight=weight)
        ours.choose(SCORES)
        fused, _ = ours.fuse(rewards, own)
        state = ours.state_dict()
        out = af.cross_level_advantages(rewards, 4, mean=state["mean"], variance=state["variance"])
        groups = (own + weight * out.calibrated).view(-1, 4)
        expected = groups * (3 / groups.abs().amax(1, keepdim=True)).clamp(max=1)
        torch.testing.assert_close(fused, expected.flatten())
    assert fused[3] == 3 and weight == 70.0


def test_sign_flips_are_counted() -> None:
    """Images above their group's mean, 0.285, and below the capability, 0.4: false positives."""
    ours = curriculum(advantage=AdvantageConfig(norm="group_std", clip=5.0, clip_mode="clip"), weight=100.0)
    ours.choose(SCORES)
    rewards = torch.tensor([0.0, 0.3, 0.39, 0.45, NAN, 1.0, 1.5, 2.0])
    fused, row = ours.fuse(rewards, af.group_advantages(rewards, 4, norm="group_std", clip=5.0))
    assert row["sign_flips"] == pytest.approx(2 / 7)
    assert (fused[1:3] < 0).all() and fused[4] == 0


def test_keeping_all_candidates_without_a_weight_changes_nothing(small_config: Make) -> None:
    """Of the reverse process here, the runs below are of the forward one."""
    capability = CapabilityConfig(candidates=3, weight=0.0)
    trainer = Trainer(small_config(algorithm="flow_grpo", sde=SDEConfig(steps=1), capability=capability))
    ours, its = trainer.roll_out(0)
    trainer.curriculum = None
    plain, row = trainer.roll_out(0)
    assert torch.equal(ours.x0, plain.x0) and torch.equal(ours.advantages, plain.advantages)
    assert {name: its[name] for name in row} == row and its.keys() - row.keys() == set(OF_CURRICULUM)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("curriculum") / "run"
    main(["train", "--out", str(folder), *WORDS])
    return folder


WORDS = [*SMALL, "--iterations", "3", "--capability.candidates", "5", "--advantage.norm", "group_std"]


def test_candidates_are_images_too_and_the_report_shows_what_they_did(finished: Path) -> None:
    assert [row["images"] for row in rows(finished, EVALS)] == [0, 11, 22, 33]  # 2 prompts of 3 images, and 5
    logged = rows(finished, METRICS)
    assert all(name in row for row in logged for name in OF_CURRICULUM)
    page = (finished / "report.html").read_text()
    for text in ("Two-sided groups", "Distance of kept prompts", "Sign flips", "ema of 5", "5 of candidates", "33"):
        assert text in page


def test_a_rollout_stopped_after_its_candidates_goes_on_to_the_same_bits(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Evaluations, candidates and rollouts have two batches each; the eleventh is of the second rollout."""
    folder = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="stopped after iteration 1, saved"):
        stop_at_batch(patch, 11)
        main(["train", "--out", str(folder), *WORDS])
    main(["train", "--out", str(folder), "--resume"])
    assert_same_run(finished, folder)


@pytest.mark.parametrize("combine", ["gdpo", "worst_first"])
def test_rewards_normalised_in_groups_are_not_held_against_other_prompts(small_config: Make, combine: str) -> None:
    advantage = AdvantageConfig(combine=combine)  # type: ignore[arg-type]
    assert small_config(advantage=advantage).capability.candidates is None
    with pytest.raises(ValueError, match=rf'advantage.combine is .?{combine}.?; accepted: "weighted_sum" with capab'):
        small_config(advantage=advantage, capability=CapabilityConfig(candidates=5))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"candidates": 2}, r"capability.candidates is 2; accepted: rollout.prompts, 3, or more, or null"),
        ({"candidates": 10**6}, r"capability.candidates is 1000000; data.prompts has only"),
        ({"decay": 1.0}, r"capability.decay is 1.0; accepted: a number in \[0, 1\)"),
    ],
)
def test_what_makes_no_sense_is_refused(small_config: Make, changes: dict[str, float], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Trainer(small_config(capability=CapabilityConfig(**changes)))  # type: ignore[arg-type]
