"""The share of a gradient that repeats, on gradients whose share is known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("advflow", reason="the trainer is not installed")

from bench.learning import gradient_signal


def test_a_constant_gradient_is_all_signal() -> None:
    found = gradient_signal.signal(torch.randn(50).repeat(6, 1))
    assert found.share == pytest.approx(1) and found.standard_error == pytest.approx(0, abs=1e-6)
    assert found.parameters == 50


def test_noise_is_no_signal_and_its_error_says_so() -> None:
    torch.manual_seed(0)
    found = gradient_signal.signal(torch.randn(30, 2000))
    assert abs(found.share) < 4 * found.standard_error < 0.02


def test_a_known_mixture() -> None:
    torch.manual_seed(0)
    found = gradient_signal.signal(torch.randn(2000).sign() + 3 * torch.randn(40, 2000))
    assert found.share == pytest.approx(0.1, abs=0.02)  # 1 of 1 + 9


def test_parameters_without_gradient_do_no_harm() -> None:
    found = gradient_signal.signal(torch.cat([torch.randn(20).repeat(5, 1), torch.zeros(5, 20)], 1))
    assert found.share == pytest.approx(1)


def test_the_command_measures_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "signal.json"
    small = (
        "flow_grpo --rollout.steps 2 --rollout.prompts 2 --rollout.images_per_prompt 2 --optim.steps_per_iteration 1"
    )
    gradient_signal.main(["--rollouts", "3", "--json", str(path), small])
    (result,) = json.loads(path.read_text())["results"]
    shares = result["share"]
    assert shares["all"]["parameters"] == shares["text"]["parameters"] + shares["image"]["parameters"] > 0
    assert small[:20] in capsys.readouterr().out
    with pytest.raises(SystemExit):
        gradient_signal.main(["--rollouts", "2", "flow_grpo"])
