"""A GPU trains what a CPU does: the same images, and numbers that differ by rounding."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("diffusers", reason="the trainer's dependencies are not installed")

from advflow.cli import main
from advflow.run.log import EVALS, METRICS

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
}


@pytest.mark.parametrize("kind", RUNS)
def test_a_gpu_trains_what_a_cpu_does(kind: str, tmp_path: Path) -> None:
    found = {}
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        main(["train", *RUNS[kind].split(), *SMALL, *DENSE, "--iterations", "2", "--device", device, "--out", str(out)])
        found[device] = [rows(out, name) for name in (METRICS, EVALS)]
    (metrics, evaluations), (its_metrics, its_evaluations) = found["cpu"], found["cuda"]
    assert len(its_metrics) == 2 and len(its_evaluations) == 3
    for row, its in zip(metrics, its_metrics, strict=True):
        assert its["nonfinite_samples"] == 0 < its["grad_norm"]
        for name in ("reward", "grad_norm", "advantage_rms"):
            assert its[name] == pytest.approx(row[name], rel=2e-2), name
    for row, its in zip(evaluations, its_evaluations, strict=True):
        assert its["overall"] == pytest.approx(row["overall"], rel=2e-2)
