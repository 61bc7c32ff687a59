"""The loop on an autoregressive model: GRPO of its tokens, leave-one-out FID beside the reward, and their state."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", reason="the trainer's dependencies are not installed")

from advflow.ar_world.settings import TRANSFORMER
from advflow.ar_world.world import load
from advflow.autoregressive.checkpoints import load_weights
from advflow.autoregressive.features import VQFeatures
from advflow.autoregressive.llamagen import LlamaGen
from advflow.cli import _parse, main
from advflow.control.distribution import DistributionReward
from advflow.control.entropy import EntropyControl
from advflow.core.randomness import generator
from advflow.core.ranks import join_ranks
from advflow.run.checkpoint import checkpoints
from advflow.run.log import EVALS, METRICS
from advflow.run.trainer import Trainer
from advflow.samplers.tokens import token_states
from advflow.settings.config import TrainConfig
from advflow.settings.sources import to_config, train_parser
from advflow.settings.tokens import EntropyConfig, LooFIDConfig
from torch import Tensor

import advflow_ext as af
from tests.trainer.runs import assert_same_run, rows, stop_at_batch
from tests.trainer.several import run_together

SMALL = (
    "--config ar --device cpu --rollout.prompts 2 --rollout.images_per_prompt 3 --rollout.batch 4 "
    "--optim.micro_batch 4 --evaluation.prompts_per_category 2 --checkpoint_every 1 --evaluation.every 2"
).split()
ALL_OF_IT = (
    "--loo_fid.weight 2 --entropy.weight 0.002 --tokens.epochs 2 --optim.steps_per_iteration 2 --token_grpo.kl_weight 1"
).split()


def config_of(*words: str) -> TrainConfig:
    arguments = _parse(["train", *SMALL, *words]).train
    for name in ("resume", "config"):
        arguments.pop(name)
    return to_config(train_parser(), arguments)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokens") / "run"
    main(["train", "--out", str(folder), *SMALL, *ALL_OF_IT, "--iterations", "3"])
    return folder


def test_a_run_logs_what_it_does_to_images_and_to_their_distribution(finished: Path) -> None:
    trained, evaluated = rows(finished, METRICS), rows(finished, EVALS)
    assert [row["iteration"] for row in trained] == [0, 1, 2]
    for row in trained:
        # The learner drew them: not a rounding lies between the ratios of a first update and 1.
        assert row["first_max_log_ratio"] == 0.0 < row["max_abs_log_ratio"]
        assert 0 < row["entropy_share"] < 1 and row["loo_fid"] > 0 and row["nonfinite_samples"] == 0
    # It rises from 0 in the first twentieth, and never falls below what is the least.
    assert [row["entropy_weight"] for row in trained][0] == EntropyConfig().least
    assert [row["iteration"] for row in evaluated] == [0, 2, 3]
    for row in evaluated:
        assert list(row["categories"]) == ["single_object", "two_objects", "colors"]
        assert list(row["distribution"]) == ["fid", "precision", "recall", "modes", "modes_kl", "vendi"]


def test_a_run_stopped_in_a_rollout_goes_on_to_the_same_bits(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The moving moments and the entropy of earlier iterations too. Evaluations and rollouts have two batches each."""
    folder = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="stopped after iteration 1, saved"):
        stop_at_batch(patch, 6)
        main(["train", "--out", str(folder), *SMALL, *ALL_OF_IT, "--iterations", "3"])
    main(["train", "--out", str(folder), "--resume"])
    assert_same_run(finished, folder)
    of_whole, of_stopped = (
        json.loads((checkpoints(each / "checkpoints")[-1] / "state.json").read_text())["parts"]
        for each in (finished, folder)
    )
    assert of_stopped == of_whole
    assert of_whole["loo_fid"]["updates"] == 3 and 0 < of_whole["entropy"]["target"] < 1


def test_what_was_learnt_is_evaluated_drawn_from_exported_and_reported(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run = ["--run", str(finished)]
    main(["eval", *run])
    assert f"{rows(finished, EVALS)[-1]['overall']:.3f}" in capsys.readouterr().out
    main(["sample", *run, "--prompt", "a red circle", "--count", "2", "--guidance", "2"])
    assert (tmp_path / "samples.png").stat().st_size > 0
    main(["export", *run, "--out", "tuned"])
    tuned = load_weights(LlamaGen(TRANSFORMER), tmp_path / "tuned" / "policy.safetensors").state_dict()
    base = load().policy.state_dict()
    assert not torch.equal(tuned["output.weight"], base["output.weight"])
    page = (finished / "report.html").read_text()
    for text in ("Recall", "FID", "token_grpo", "Leave-one-out FID", "Entropy"):
        assert text in page, text


@pytest.mark.parametrize("guidance", ["1", "2"])
def test_the_gradient_is_that_of_the_two_advantages_of_sequences(guidance: str) -> None:
    trainer = Trainer(config_of("--rollout.guidance", guidance, "--loo_fid.weight", "2"))
    experience, _ = trainer.roll_out(0)
    (of_set,) = experience.more_advantages
    (update,) = trainer.process.steps(0, experience)
    for each in update:
        (each.out.loss * each.weight).backward()
    learner = trainer.policies.transformer("learner")
    got = [weight.grad.clone() for weight in trainer.policies.learner if weight.grad is not None]
    trainer.optimizer.zero_grad()

    states, head = token_states(learner, experience.x0, experience.conditioning)
    log_probs = (states @ head.T).log_softmax(2).gather(2, experience.x0[..., None])[..., 0].mean(1)
    # At a ratio of 1 the clip does nothing, and d ratio / d log-probability is 1.
    (-(experience.advantages + of_set) * log_probs).mean().backward()
    expected = [weight.grad for weight in trainer.policies.learner if weight.grad is not None]
    assert len(got) == len(expected) > 20
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-6)


def test_the_second_advantage_is_that_of_what_images_do_to_the_distribution() -> None:
    words = ("--loo_fid.weight", "2", "--loo_fid.beta", "0.25", "--loo_fid.covariance", "full")
    trainer, world = Trainer(config_of(*words)), load()
    distance = af.LeaveOneOutFID(world.reference, beta=0.25, covariance="full")
    for iteration in range(2):
        experience, row = trainer.roll_out(iteration)
        features = VQFeatures(world.tokenizer)(trainer.latents.decode(experience.x0))
        expected = 2 * af.group_advantages(distance.reward(features), 3, norm="group_std", clip=5.0, clip_mode="clip")
        distance.update(features)
        torch.testing.assert_close(experience.more_advantages, (expected,), rtol=1e-4, atol=1e-4)
        assert row["loo_fid"] == pytest.approx(distance.fid().item(), rel=1e-5)
    assert Trainer(config_of("--loo_fid.weight", "0")).roll_out(0)[0].more_advantages == ()


def test_a_reference_of_other_features_is_refused() -> None:
    world = load()
    other = af.FeatureMoments(world.reference.mean, world.reference.covariance, world.reference.count, "another", "way")
    with pytest.raises(ValueError, match="the reference's extractor is 'another'; accepted is that of the images, 'VQ"):
        DistributionReward(LooFIDConfig(1.0), VQFeatures(world.tokenizer), other)


def test_a_rollout_policy_that_lags_is_what_ratios_are_of() -> None:
    """In whatever batch: two of its images in a micro-batch here, six in the check."""
    trainer = Trainer(config_of("--rollout_policy.rate", "0.01", "--optim.micro_batch", "2"))
    with torch.no_grad():
        for weight in trainer.policies.learner:
            weight.add_(1e-2 * weight * torch.randn(weight.shape, generator=generator(0, "weights", 0)))
    experience, _ = trainer.roll_out(0)
    (update,) = trainer.process.steps(0, experience)
    found = sum((each.weight * each.out.metrics.as_dict()["mean_log_ratio"] for each in update), 0.0)

    def log_prob(role: Any) -> Tensor:
        states, head = token_states(trainer.policies.transformer(role), experience.x0, experience.conditioning)
        return af.token_log_prob(states, head, experience.x0).detach().double().mean()

    assert found == pytest.approx((log_prob("learner") - log_prob("rollout")).item(), abs=1e-6)
    assert abs(found) > 1e-4


def test_images_of_one_rollout_do_not_depend_on_its_batches() -> None:
    whole, parts = (Trainer(config_of("--rollout.batch", size)).roll_out(0)[0].x0 for size in ("6", "1"))
    assert torch.equal(whole, parts)


def test_the_controller_is_the_released_one() -> None:
    config = EntropyConfig(weight=2.2e-3, target=0.78)
    control = EntropyControl(config, iterations=100, vocabulary=16384)
    control.update(0.7 * math.log(16384), 9)
    assert control.weight(10) == pytest.approx(2.2e-3 * math.exp(3 * 0.08))
    assert control.weight(0) == 7e-5
    assert control.weight(4) == pytest.approx(0.8 * 2.2e-3 * math.exp(3 * 0.08))
    assert control.weight(92) == pytest.approx(2.2e-3 * math.exp(3 * 0.08) * (1 + math.cos(math.pi * 7 / 15)) / 2)
    control.update(0.77 * math.log(16384), 10)  # within its deadband
    assert control.weight(11) == pytest.approx(2.2e-3)
    control.update(0.2 * math.log(16384), 11)
    assert control.weight(12) == 4e-3
    control.update(0.0, 12)  # nothing was measured
    assert control.weight(13) == 4e-3


def test_the_controller_holds_what_there_was_where_no_target_is_set() -> None:
    control = EntropyControl(EntropyConfig(weight=1e-3), iterations=100, vocabulary=512)
    assert control.update(0.3 * math.log(512), 5)["entropy_weight"] == 1e-3
    control.update(0.2 * math.log(512), 6)
    assert control.weight(7) == pytest.approx(1e-3 * math.exp(0.3))
    other = EntropyControl(EntropyConfig(weight=1e-3), iterations=100, vocabulary=512)
    other.load_state_dict(control.state_dict())
    assert other.weight(7) == control.weight(7)
    assert EntropyControl(EntropyConfig(), 100, 512).weight(50) == 0


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--algorithm", "awm"], "model.family is 'llamagen'; accepted: a family that draws latents, with \"awm\""),
        (["--model.family", "sd3"], "model.family is 'sd3'; accepted: a family that draws tokens, with \"token_grpo\""),
        (["--model.trainable", "lora"], "model.trainable is 'lora'; accepted: 'full' with \"token_grpo\""),
        (["--model.dtype", "bfloat16"], "model.dtype is 'bfloat16'; accepted: 'float32'"),
        (["--runtime.shard", "true"], "runtime.shard is True; accepted: False"),
        (["--draws.guidance", "2"], "draws.guidance is 2.0; accepted: 1.0"),
        (["--model.resolution", "64"], 'model.resolution is 64; accepted with "llamagen": 32'),
        (["--model.pipeline", "nowhere"], "model.pipeline is 'nowhere'; accepted with model.family \"llamagen\""),
        (["--data.prompts", "shapes", "--data.reward", "redness"], "accepted: 1 to"),
        (["--optim.steps_per_iteration", "5"], "accepted are divisors of the 6 images of an iteration"),
        (["--token_grpo.clip", "1"], "token_grpo.clip is 1.0"),
        (["--config", "tiny", "--loo_fid.weight", "1"], "loo_fid.weight is 1.0; accepted: 0 with"),
    ],
)
def test_what_makes_no_sense_is_refused(words: list[str], sentence: str, tmp_path: Path) -> None:
    small = SMALL[2:] if "--config" in words else SMALL
    with pytest.raises(SystemExit) as refusal:
        main(["train", *small, *words, "--out", str(tmp_path / "run")])
    assert sentence in str(refusal.value) and not (tmp_path / "run").exists()


def _two_iterations(folder: str) -> None:
    ranks = join_ranks("cpu")
    trainer = Trainer(config_of("--loo_fid.weight", "2", "--entropy.weight", "0.002"), ranks=ranks)
    table = [trainer.iterate(iteration) for iteration in range(2)]
    torch.save({"rows": table, "weights": list(trainer.policies.learner)}, Path(folder) / f"{ranks.rank}.pt")
    ranks.close()


def test_two_processes_share_moments_and_gradients(tmp_path: Path) -> None:
    run_together(2, _two_iterations, str(tmp_path))
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert all(map(torch.equal, one["weights"], other["weights"]))
    trainer = Trainer(config_of("--loo_fid.weight", "2", "--entropy.weight", "0.002"))
    for iteration, its in enumerate(one["rows"]):
        row = trainer.iterate(iteration)
        for name in ("reward", "loo_fid", "loss", "grad_norm", "mean_entropy", "entropy_weight"):
            assert its[name] == pytest.approx(row[name], rel=1e-4, abs=1e-5), name
    torch.testing.assert_close(one["weights"], list(trainer.policies.learner), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_reward_goes_up(tmp_path: Path) -> None:
    """A minute or two of a core."""
    words = [*SMALL[:4], "--loo_fid.weight", "0", "--iterations", "20", "--evaluation.every", "20"]
    main(["train", "--out", str(tmp_path / "run"), *words])
    base, final = (row["overall"] for row in rows(tmp_path / "run", EVALS))
    assert final > base + 0.04
