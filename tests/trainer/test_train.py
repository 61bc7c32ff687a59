"""The training loop: it improves nothing here, but it must be exact, resumable and honest about its inputs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from advflow.algorithms import make_algorithm
from advflow.algorithms.batch import ForwardBatch
from advflow.control.reference import ReferenceControl
from advflow.core.provenance import STARTS
from advflow.models.sd3 import SD3, load_pipeline
from advflow.policies import Policies, follow, make_policies, velocity_of
from advflow.processes.metrics import join_metrics
from advflow.run.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from advflow.run.log import EVALS, METRICS, SAMPLES, read_rows
from advflow.run.train import train
from advflow.run.trainer import Trainer, learning_rate, rollout_decay
from advflow.settings.config import TrainConfig
from advflow.settings.data import AdvantageConfig
from advflow.settings.methods import DiffusionNFTConfig, FlowAWRConfig
from advflow.settings.model import ModelConfig, RuntimeConfig
from advflow.settings.optim import OptimConfig, ReferenceConfig, RolloutPolicyConfig
from advflow.settings.processes import SDEConfig
from advflow.settings.registry import METHODS

import advflow_ext as af
from tests.trainer.runs import assert_same_run

Make = Callable[..., TrainConfig]
LORA = ModelConfig(trainable="lora", lora_rank=4, lora_alpha=8)


@pytest.mark.parametrize("model", [ModelConfig(), LORA], ids=["full", "lora"])
def test_a_run_leaves_everything_it_promises(small_config: Make, model: ModelConfig) -> None:
    config = small_config(model=model)
    summary = train(config, resume=False)
    folder = Path(config.out)
    metrics = read_rows(folder / METRICS)
    assert [row["iteration"] for row in metrics] == [0, 1, 2]
    for row in metrics:
        seconds = row["seconds_rollout"] + row["seconds_train"]
        assert row["images_per_second"] == pytest.approx(12 / seconds, rel=1e-3 + 2e-4 / seconds)
    assert [row["iteration"] for row in read_rows(folder / EVALS)] == [0, 2, 3]
    assert len(list((folder / SAMPLES).glob("*.png"))) == 3
    assert json.loads((folder / "summary.json").read_text()) == summary
    (start,) = read_rows(folder / STARTS)
    assert start["iteration"] == 0 and (start["versions"], start["commit"]) == (summary["versions"], summary["commit"])
    assert summary["images"] == 3 * 12
    assert list((folder / "tensorboard").iterdir())
    assert len(checkpoints(folder / "checkpoints")) == 2


@pytest.mark.parametrize(
    ("algorithm", "steps", "model"),
    [
        pytest.param("advantage_flow", 1, LORA, id="advantage_flow-1-lora"),
        pytest.param("advantage_flow", 2, ModelConfig(), id="advantage_flow-2-full"),
        pytest.param("flow_dppo", 2, LORA, id="flow_dppo-2-lora"),
        pytest.param("flow_dppo", 2, ModelConfig(), id="flow_dppo-2-full", marks=pytest.mark.slow),
    ],
)
def test_resuming_equals_never_having_stopped(
    small_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algorithm: str, steps: int, model: ModelConfig
) -> None:
    whole = small_config(
        algorithm=algorithm,
        model=model,
        optim=OptimConfig(micro_batch=5, steps_per_iteration=steps),
        sde=SDEConfig(window="random", steps=1, within=2, epochs=2),
        reference=ReferenceConfig(1e-9),
        out=str(tmp_path / "whole"),
        iterations=4,
    )
    train(whole, resume=False)
    parts = replace(whole, out=str(tmp_path / "parts"))
    iterate = Trainer.iterate

    def killed_in_the_third(self: Trainer, iteration: int) -> dict[str, float]:
        if iteration == 2:
            raise KeyboardInterrupt
        return iterate(self, iteration)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "iterate", killed_in_the_third)
        train(parts, resume=False)
    # What a killed run may leave behind: rows after its last checkpoint, and a line cut short.
    with (Path(parts.out) / METRICS).open("a") as handle:
        handle.write('{"iteration": 2, "reward": 9.0}\n{"iteration": 3, "rew')
    train(parts, resume=True)
    assert [row["iteration"] for row in read_rows(Path(parts.out) / STARTS)] == [0, 2]
    assert_same_run(Path(whole.out), Path(parts.out))
    last = [checkpoints(Path(each.out) / "checkpoints")[-1] for each in (whole, parts)]
    assert (last[0] / "state.json").read_text() == (last[1] / "state.json").read_text()


def test_the_first_gradient_is_the_same_for_every_micro_batch(small_config: Make) -> None:
    rows = []
    for micro_batch in (12, 5, 1):
        trainer = Trainer(small_config(optim=OptimConfig(micro_batch=micro_batch)))
        rows.append(trainer.iterate(0))
    for row in rows[1:]:
        assert row["grad_norm"] == pytest.approx(rows[0]["grad_norm"], rel=1e-4)
        assert row["loss"] == pytest.approx(rows[0]["loss"], rel=1e-4)


def _velocities(policies: Policies, trainer: Trainer) -> dict[str, torch.Tensor]:
    x = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.3, 0.9])
    roles = ("learner", "rollout", "reference")
    with torch.no_grad():
        return {r: velocity_of(policies, r)(x, t, trainer.conditioning[:2]) for r in roles}  # type: ignore[arg-type]


@pytest.mark.parametrize("model", [ModelConfig(), LORA], ids=["full", "lora"])
def test_the_three_policies(small_config: Make, model: ModelConfig) -> None:
    trainer = Trainer(
        small_config(model=model, optim=OptimConfig(lr=1e-2), rollout_policy=RolloutPolicyConfig(1.0, 0, 0.5))
    )
    before = _velocities(trainer.policies, trainer)
    assert torch.equal(before["learner"], before["rollout"]) and torch.equal(before["learner"], before["reference"])
    start = [p.detach().clone() for p in trainer.policies.rollout]
    trainer.iterate(0)
    after = _velocities(trainer.policies, trainer)
    assert torch.equal(after["reference"], before["reference"])
    assert not torch.equal(after["learner"], before["learner"])
    trainer.policies.transformer("learner")
    for old, rollout, learner in zip(start, trainer.policies.rollout, trainer.policies.learner, strict=True):
        torch.testing.assert_close(rollout, 0.5 * old + 0.5 * learner)
        assert not rollout.requires_grad and learner.requires_grad


def test_following_with_rho_zero_copies_the_learner() -> None:
    policies = make_policies(SD3(), load_pipeline(LORA, torch.device("cpu")).transformer, LORA, RuntimeConfig(), seed=0)
    with torch.no_grad():
        for parameter in policies.learner:
            parameter.normal_()
    follow(policies, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(policies.learner, policies.rollout, strict=True))


def test_rollout_decay_schedules_of_diffusion_nft() -> None:
    default, ocr = RolloutPolicyConfig(0.001, 0, 0.5), RolloutPolicyConfig(0.0075, 75, 0.999)
    assert [rollout_decay(default, s) for s in (0, 100, 500, 9999)] == pytest.approx([0, 0.1, 0.5, 0.5])
    assert [rollout_decay(ocr, s) for s in (0, 75, 175, 9999)] == pytest.approx([0, 0, 0.75, 0.999])


def test_metrics_of_micro_batches_are_joined_by_what_they_are() -> None:
    names = ("loss", "max_abs_log_ratio", "min_curvature", "masked_samples", "invalid_steps")
    parts = [([1.0, 0.5, 0.1, 3.0, 1.0], 0.25), ([3.0, 0.2, -0.4, 2.0, 0.0], 0.75)]
    joined = join_metrics([(af.LossMetrics(torch.tensor(values), names), weight) for values, weight in parts])
    assert joined == pytest.approx(dict(zip(names, [2.5, 0.5, -0.4, 5.0, 1.0], strict=True)))


def test_learning_rate_rises_and_falls() -> None:
    late = OptimConfig(lr=1.0, warmup=4, decay="second_half", hold=None)
    flat, held = (OptimConfig(lr=1.0, warmup=0, decay="none", hold=hold) for hold in (None, 5))
    assert [learning_rate(late, s, 10) for s in (0, 3, 5, 6, 9)] == pytest.approx([0.25, 1.0, 1.0, 0.8, 0.2])
    assert [learning_rate(flat, s, 10) for s in (0, 9)] == [1.0, 1.0]
    assert [learning_rate(held, s, 10) for s in (0, 4, 9)] == [1.0, 1.0, 0.5]


def test_the_pull_towards_the_reference_grows_while_the_learner_is_too_far_away() -> None:
    control, free = ReferenceControl(0.1), ReferenceControl(None)
    used = []
    for deviation in (0.05, 0.11, 9.0, float("nan"), 0.0, 0.09, 0.01, 0.01):
        row = {"reference_deviation": deviation}
        used.append(control.update(row)["reference_scale"])
        assert free.update(row) == {}
    grown = 1.01 * 1.02
    assert used == pytest.approx([1.0, 1.0, 1.01, grown, grown, grown, grown * 0.99, 1.0])
    for each in (control, free):
        each.load_state_dict({"scale": 5.0})
    assert (control.scale, free.scale) == (5.0, 1.0)


def test_the_scale_is_logged_and_acts(small_config: Make) -> None:
    rows = []
    for target in (None, 1e-12, 1e12):
        trainer = Trainer(small_config(reference=ReferenceConfig(target), optim=OptimConfig(lr=1e-2)))
        rows.append([trainer.iterate(iteration) for iteration in range(3)])
    free, held, wide = rows
    assert "reference_scale" not in free[0]
    # Before the first update the learner is the reference: the second iteration is the first that finds it away.
    assert [row["reference_scale"] for row in held] == pytest.approx([1.0, 1.0, 1.02])
    assert [row["reference_scale"] for row in wide] == [1.0] * 3
    assert [row["grad_norm"] for row in free] == [row["grad_norm"] for row in wide]
    assert [row["loss"] == other["loss"] for row, other in zip(held, wide, strict=True)] == [True, True, False]


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.process == "forward"])
def test_the_scale_multiplies_every_method_s_weight_of_the_reference(name: str) -> None:
    rng = torch.Generator().manual_seed(0)
    v, v_old, v_ref, x0, noise = torch.randn(5, 6, 8, generator=rng).unbind()
    t, rewards = torch.linspace(0.1, 0.9, 6), torch.rand(6, generator=rng)
    batch = ForwardBatch(v, v_old, v_ref, x0, noise, t, rewards, rewards - rewards.mean(), 6, 1.0)
    weight = "lam" if name == "advantage_flow" else "kl_weight"
    section = METHODS[name].settings
    plain, doubled = (make_algorithm(name, section(**{weight: value})) for value in (0.25, 0.5))  # type: ignore[misc]
    assert plain.loss(replace(batch, reference_scale=2.0)).loss == doubled.loss(batch).loss
    assert plain.loss(batch).loss != doubled.loss(batch).loss


@pytest.mark.parametrize("gate", [False, True])
def test_softmax_advantages_are_those_of_flow_awr(small_config: Make, gate: bool) -> None:
    advantage = AdvantageConfig(norm="softmax", clip=2.0, clip_mode="clip", scale_by_std=gate)
    config = small_config(algorithm="flow_awr", advantage=advantage)
    rewards = torch.rand(12, generator=torch.Generator().manual_seed(0))
    expected = af.softmax_advantages(
        rewards, config.rollout.images_per_prompt, clip_rewards=2.0, clip=3.0, scale_by_std=gate
    )
    assert torch.equal(Trainer(config)._advantages(rewards), expected)


def test_flow_awr_trains_with_its_weighting() -> None:
    rng = torch.Generator().manual_seed(0)
    v, v_old, v_ref, x0, noise = torch.randn(5, 6, 8, generator=rng).unbind()
    t, A = torch.linspace(0.1, 0.9, 6), torch.linspace(-1, 2, 6)
    batch = ForwardBatch(v, v_old, v_ref, x0, noise, t, A, A, 6, 1.0)
    for weighting in ("adaptive", "prediction", "velocity"):
        algorithm = make_algorithm("flow_awr", FlowAWRConfig(kl_weight=0.5, weighting=weighting))
        expected = af.flow_awr_loss(v, x0, noise, t, A, v_old=v_old, v_ref=v_ref, kl_weight=0.5, weighting=weighting)
        assert algorithm.loss(batch).loss == expected.loss
    assert TrainConfig().flow_awr.weighting == "adaptive"


def test_a_reference_without_weight_is_not_asked(small_config: Make) -> None:
    trainer = Trainer(small_config(diffusion_nft=DiffusionNFTConfig(kl_weight=0.0), algorithm="diffusion_nft"))
    assert "reference_scale" not in trainer.iterate(0)
    with pytest.raises(ValueError, match=r"reference.target_deviation is 0.0; accepted: a positive number, or null"):
        ReferenceConfig(0.0)


def test_a_checkpoint_of_another_model_is_refused(small_config: Make, tmp_path: Path) -> None:
    small, large = (Trainer(small_config(model=replace(LORA, lora_rank=rank))) for rank in (2, 4))
    path = save_checkpoint(tmp_path, 1, small.parts)
    with pytest.raises(ValueError, match="does not fit this run: of its part 'learner', its 0000 is"):
        load_checkpoint(path, large.parts)
    full = Trainer(small_config())
    with pytest.raises(ValueError, match="does not fit this run"):
        load_checkpoint(path, full.parts)


def test_a_half_written_checkpoint_is_not_a_checkpoint(small_config: Make, tmp_path: Path) -> None:
    trainer = Trainer(small_config(model=LORA))
    save_checkpoint(tmp_path, 1, trainer.parts)
    (tmp_path / ".000002.partial").mkdir()
    (tmp_path / "000003").mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == ["000001"]


def test_a_broken_sample_does_not_poison_the_run(small_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """One image of NaN costs its own contribution and shows up in the count."""
    import advflow.processes.forward as module

    real = module.sample_latents

    def with_nan(*args: object) -> torch.Tensor:
        latents = real(*args)  # type: ignore[arg-type]
        latents[0] = torch.nan
        return latents

    monkeypatch.setattr(module, "sample_latents", with_nan)
    trainer = Trainer(small_config())
    row = trainer.iterate(0)
    assert row["broken_images"] > 0 and row["nonfinite_samples"] > 0 and row["skipped_steps"] == 0
    assert all(torch.isfinite(p).all() for p in trainer.policies.learner)


def test_a_step_whose_gradient_is_not_finite_is_skipped_and_counted(small_config: Make) -> None:
    trainer = Trainer(small_config())
    before = [p.detach().clone() for p in trainer.policies.learner]
    trainer.policies.learner[0].register_hook(lambda gradient: gradient * torch.inf)
    row = trainer.iterate(0)
    assert row["skipped_steps"] == 1 and row["grad_norm"] == 0.0
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.policies.learner, strict=True))
