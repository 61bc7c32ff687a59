"""A GPU trains what a CPU does: the same images, and numbers that differ by rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", reason="the trainer's dependencies are not installed")

from advflow.cli import main
from advflow.rewards import Prompt, load_reward
from advflow.run.log import EVALS, METRICS
from advflow.settings.serve import ServeConfig

from tests.trainer.reward_models import save_clip
from tests.trainer.reward_servers import real_server
from tests.trainer.runs import SMALL, rows

pytestmark = pytest.mark.gpu
# Of a reward without thresholds, and a rate that a step of shows.
DENSE = "--data.reward redness --optim.lr 1e-3 --optim.warmup 0".split()
ONE_STEP = "--sde.window first --sde.steps 1"
RUNS = {
    "forward": "--algorithm advantage_flow",
    "guided": "--algorithm diffusion_nft --rollout.guidance 2 --draws.guidance 2",
    "reverse": f"--algorithm flow_grpo {ONE_STEP}",
    "reweighted": f"--algorithm flow_grpo {ONE_STEP} --sde.reweight true --optim.steps_per_iteration 1 "
    "--model.trainable lora --rollout_policy.rate 0",
    "tokens": "--config ar --loo_fid.weight 1 --entropy.weight 0.002",
    "tf32": "--algorithm advantage_flow --runtime.tf32 true --runtime.attention efficient",
    "bfloat16, replayed": "--algorithm advantage_flow --model.trainable lora --model.dtype bfloat16 "
    "--runtime.attention flash --runtime.cuda_graphs true",
}
# In bfloat16 the gradient of these weights is 3 % from that in float32, on a CPU alone.
TOLERANCE = {"bfloat16, replayed": 0.1}


SPREAD = 0.02  # of this reward over untrained images; a mean of some may be near 0


def trained(words: str, device: str, out: Path) -> list[list[dict[str, Any]]]:
    """The rows of metrics and of evaluations."""
    main(["train", *words.split(), *SMALL, *DENSE, "--iterations", "2", "--device", device, "--out", str(out)])
    return [rows(out, name) for name in (METRICS, EVALS)]


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[torch.cuda.CUDAGraph]:
    """Every CUDA graph each time it is replayed."""
    seen, replay = [], torch.cuda.CUDAGraph.replay

    def noted(graph: torch.cuda.CUDAGraph) -> None:
        seen.append(graph)
        replay(graph)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", noted)
    return seen


@pytest.mark.parametrize("kind", RUNS)
def test_a_gpu_trains_what_a_cpu_does(kind: str, tmp_path: Path, replays: list[torch.cuda.CUDAGraph]) -> None:
    metrics, evaluations = trained(RUNS[kind], "cpu", tmp_path / "cpu")
    its_metrics, its_evaluations = trained(RUNS[kind], "cuda", tmp_path / "cuda")
    tolerance = TOLERANCE.get(kind, 2e-2)
    assert len(its_metrics) == 2 and len(its_evaluations) == 3
    for row, its in zip(metrics, its_metrics, strict=True):
        assert its["nonfinite_samples"] == 0 < its["grad_norm"]
        assert its["reward"] == pytest.approx(row["reward"], rel=tolerance, abs=tolerance * SPREAD)
        for name in ("grad_norm", "advantage_rms"):
            assert its[name] == pytest.approx(row[name], rel=tolerance), name
    for row, its in zip(evaluations, its_evaluations, strict=True):
        assert its["overall"] == pytest.approx(row["overall"], rel=tolerance, abs=tolerance * SPREAD)
    assert bool(replays) == ("cuda_graphs" in RUNS[kind])


def test_tf32_rounds_otherwise(tmp_path: Path) -> None:
    (exact, _), (rounded, _) = (trained(RUNS[kind], "cuda", tmp_path / kind) for kind in ("forward", "tf32"))
    assert [row["grad_norm"] for row in exact] != [row["grad_norm"] for row in rounded]


def test_a_server_on_a_gpu_scores_as_a_cpu_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("fastapi", "uvicorn"):
        pytest.importorskip(module, reason='needs the extra "serve": pip install "advflow[serve]"')
    folder = save_clip(tmp_path / "clip")
    images = torch.rand(5, 3, 32, 24, generator=torch.Generator().manual_seed(1))
    prompts = [Prompt(text) for text in ("a red circle", "two squares", "a circle", "a square", "three circles")]
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    with real_server(ServeConfig(reward="clipscore", reward_args={"model": folder}, port=0)) as address:
        scores = load_reward("remote", {"urls": [address], "reward": "clipscore"})(images, prompts)
    assert torch.cuda.max_memory_allocated() > held
    monkeypatch.setattr("advflow.rewards.loading.scoring_device", lambda: "cpu")
    expected = load_reward("clipscore", {"model": folder})(images, prompts)
    torch.testing.assert_close(scores.reward.cpu(), expected.reward, rtol=1e-3, atol=1e-4)
