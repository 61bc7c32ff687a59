"""The moving average of the learner's weights: what is evaluated, sampled, exported, and never what is trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", reason="the trainer's dependencies are not installed")

from advflow.run.average import WeightAverage
from advflow.run.checkpoint import load_newest, save_checkpoint
from advflow.run.folder import write_config
from advflow.run.inference import evaluate_run, load_judgement, load_run
from advflow.run.train import train
from advflow.run.trainer import Trainer
from advflow.settings.config import TrainConfig
from advflow.settings.data import EvalConfig
from advflow.settings.model import ModelConfig
from advflow.settings.sources import load_run_config
from safetensors.torch import load_file

Make = Callable[..., TrainConfig]
EMA = EvalConfig(every=2, steps=2, prompts_per_category=2, ema=0.5)


def test_it_follows_as_flow_grpos_does() -> None:
    """Decay (1 + n) / (10 + n) until it reaches what was asked for: 0.1, 0.1818, 0.25, 0.25."""
    learner = [torch.nn.Parameter(torch.zeros(2))]
    average = WeightAverage(learner, 0.25)
    expected = 0.0
    for step, decay in enumerate((0.1, 2 / 11, 0.25, 0.25)):
        with torch.no_grad():
            learner[0].add_(1.0)
        average.update(step)
        expected = decay * expected + (1 - decay) * (step + 1)
        assert average.state_dict()["0000"].tolist() == pytest.approx([expected] * 2)


def test_it_is_in_force_only_while_it_is_asked_for() -> None:
    learner = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2, 2))]
    average = WeightAverage(learner, 0.9)
    with torch.no_grad():
        learner[0].fill_(5.0)
    with pytest.raises(RuntimeError, match="inside"), average.in_force():
        assert learner[0].tolist() == [1.0] * 3
        raise RuntimeError("inside")
    assert learner[0].tolist() == [5.0] * 3


@pytest.mark.parametrize("trainable", ["full", "lora"])
def test_training_is_the_same_and_what_is_given_away_another(
    small_config: Make, tmp_path: Path, trainable: Any
) -> None:
    """Three iterations, so that the average and the learner differ; evaluation sees the average."""
    model = ModelConfig(trainable=trainable, lora_rank=4)
    trainers = [
        Trainer(small_config(model=model, evaluation=e)) for e in (EMA, EvalConfig(steps=2, prompts_per_category=2))
    ]
    for iteration in range(3):
        rows = [trainer.iterate(iteration) for trainer in trainers]
        assert rows[0]["loss"] == rows[1]["loss"] and rows[0]["reward"] == rows[1]["reward"]
    for one, other in zip(*(trainer.policies.learner for trainer in trainers), strict=True):
        assert torch.equal(one, other)
    averaged, plain = (trainer.evaluate() for trainer in trainers)
    assert not torch.equal(averaged.images, plain.images)
    for one, other in zip(*(trainer.policies.learner for trainer in trainers), strict=True):
        assert torch.equal(one, other)

    # Written and read again: the export is the average, and so is what `advflow eval` loads.
    config = trainers[0].config
    (tmp_path / "run").mkdir()
    write_config(config)
    save_checkpoint(tmp_path / "run" / "checkpoints", 3, trainers[0].parts, export=trainers[0].export)
    run = load_run(tmp_path / "run", load_run_config(config.out), base=False)
    drawn = evaluate_run(run, load_judgement(run.config)).images
    assert (drawn - averaged.images[:1]).abs().max() < 1e-5 < (drawn - plain.images[:1]).abs().max()
    folder = tmp_path / "run" / "checkpoints" / "000003"
    name = (
        "pytorch_lora_weights.safetensors" if trainable == "lora" else "transformer/diffusion_pytorch_model.safetensors"
    )
    written = {tuple(tensor.shape): tensor for tensor in load_file(folder / name).values()}
    stored = trainers[0].parts["average"].state_dict()
    assert any(torch.equal(written[tuple(each.shape)], each) for each in stored.values())


def test_a_resumed_run_goes_on_to_the_same_bits(small_config: Make, tmp_path: Path) -> None:
    whole = Trainer(small_config(evaluation=EMA))
    for iteration in range(3):
        whole.iterate(iteration)
        if iteration == 1:
            save_checkpoint(tmp_path, 2, whole.parts)
    resumed = Trainer(small_config(evaluation=EMA))
    assert load_newest(tmp_path, resumed.parts) == 2
    resumed.iterate(2)
    for name, tensor in whole.parts["average"].state_dict().items():
        assert torch.equal(tensor, resumed.parts["average"].state_dict()[name]), name


def test_a_run_with_one_ends_and_is_not_resumed_without(small_config: Make) -> None:
    config = small_config(iterations=1, evaluation=EMA)
    assert train(config, resume=False)["iterations"] == 1
    with pytest.raises(ValueError, match="other settings: evaluation.ema"):
        train(small_config(iterations=2), resume=True)


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.5])
def test_another_decay_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match=rf"evaluation.ema is {decay}; accepted: null, or a number in \(0, 1\)"):
        EvalConfig(ema=decay)
