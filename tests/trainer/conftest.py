from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("diffusers", reason="the trainer's dependencies are not installed")

from advflow.settings.config import TrainConfig
from advflow.settings.data import EvalConfig, RolloutConfig
from advflow.settings.model import ModelConfig
from advflow.settings.optim import OptimConfig
from advflow.settings.processes import DrawConfig


@pytest.fixture
def small_config(tmp_path: Path) -> Callable[..., TrainConfig]:
    """Makes settings of a run that takes a second or two."""

    def make(**changes: object) -> TrainConfig:
        settings: dict[str, object] = {
            "iterations": 3,
            "out": str(tmp_path / "run"),
            "checkpoint_every": 1,
            "model": ModelConfig(),
            "rollout": RolloutConfig(prompts=3, images_per_prompt=4, steps=3, batch=8),
            "draws": DrawConfig(per_image=2),
            "optim": OptimConfig(micro_batch=5),
            "evaluation": EvalConfig(every=2, steps=2, prompts_per_category=2),
        }
        return TrainConfig(**(settings | changes))  # type: ignore[arg-type]

    return make
