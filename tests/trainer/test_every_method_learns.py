"""Every method, with its own built-in settings, raises the easiest reward there is: a broken one would not."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers", reason="the trainer's dependencies are not installed")

import advflow.run.evaluate as evaluate_module
from advflow.run.log import read_rows
from advflow.run.train import train
from advflow.run.trainer import Trainer
from advflow.settings.config import TrainConfig
from advflow.settings.registry import METHODS
from advflow.settings.sources import resolve_configs, to_config, train_parser

pytestmark = pytest.mark.slow

ITERATIONS, EVERY = 18, 9  # 2 to 3 minutes of a core
SEEDS = range(6)
DEVIATIONS = 4


def config_of(*words: str) -> TrainConfig:
    resolved = resolve_configs(["train", "--device", "cpu", "--data.reward", "redness", *words])
    parser = train_parser()
    return to_config(parser, parser.parse_args(resolved[1:]))


@pytest.fixture(scope="module")
def spread() -> float:
    """The standard deviation of the base's held-out score over seeds of the images' noise."""
    trainer = Trainer(config_of())
    scores = []
    with pytest.MonkeyPatch.context() as patch:
        for seed in SEEDS:
            patch.setattr(evaluate_module, "_NOISE_SEED", seed)
            scores.append(trainer.evaluate([0]).overall)
    found = torch.tensor(scores).std().item()
    print(f"the base scores {scores[0]:.4f}, +- {found:.4f} over seeds")
    assert found > 0
    return found


@pytest.mark.parametrize("algorithm", [name for name, method in METHODS.items() if method.process != "tokens"])
def test_it_learns(algorithm: str, spread: float, tmp_path: Path) -> None:
    words = ("--algorithm", algorithm, "--iterations", str(ITERATIONS), "--evaluation.every", str(EVERY))
    train(config_of(*words, "--out", str(tmp_path / "run")), resume=False)
    scores = [row["overall"] for row in read_rows(tmp_path / "run" / "evals.jsonl")]
    gains = [(later - earlier) / spread for earlier, later in itertools.pairwise(scores)]
    print(f"{algorithm}: {' -> '.join(f'{score:.4f}' for score in scores)}")
    assert min(gains) > 0 and sum(gains) >= DEVIATIONS
