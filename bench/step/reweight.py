"""What `sde.reweight` is worth: the same iterations with a second pass of each stochastic step and without.

python -m bench.step.reweight --json reweight.json        # the embedded world, LoRA; both take turns in one process

Flow-GRPO with one update an iteration. The gain grows with the share of an iteration's steps that are learnt from. On a
CPU seconds are the process's own, which others on the machine do not lengthen much.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from advflow.run.trainer import Trainer
from advflow.settings.config import TrainConfig
from advflow.settings.data import RolloutConfig
from advflow.settings.model import ModelConfig
from advflow.settings.optim import OptimConfig, RolloutPolicyConfig
from advflow.settings.processes import SDEConfig

from advflow_ext.bench.harness import report
from bench.roofline.models import count


def settings(steps: int, batch: int) -> TrainConfig:
    """32 images an iteration, 10 sampler steps, the first `steps` of them stochastic and learnt from."""
    return TrainConfig(
        algorithm="flow_grpo",
        model=ModelConfig(trainable="lora", lora_rank=32, lora_alpha=64),
        rollout=RolloutConfig(prompts=4, images_per_prompt=8, steps=10, batch=batch),
        optim=OptimConfig(micro_batch=batch),
        rollout_policy=RolloutPolicyConfig(rate=0.0),
        sde=SDEConfig(steps=steps),
    )


def measure(config: TrainConfig, rounds: int) -> dict[str, Any]:
    """Medians of `rounds` iterations of each kind, which take turns; the first of both is not counted."""
    kinds = {"second pass": config, "reweighted": replace(config, sde=replace(config.sde, reweight=True))}
    trainers = {name: Trainer(each) for name, each in kinds.items()}
    clock = time.monotonic if torch.cuda.is_available() else time.process_time
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for iteration in range(rounds + 1):
        for name, trainer in trainers.items():
            began = clock()
            trainer.iterate(iteration)
            if iteration:
                seconds[name].append(clock() - began)
    medians = {name: statistics.median(of_name) for name, of_name in seconds.items()}
    return {
        "stochastic_steps": config.sde.steps,
        "batch": config.rollout.batch,
        "rounds": rounds,
        "seconds": medians,
        "all": seconds,
        "speedup": medians["second pass"] / medians["reweighted"],
    }


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m bench.step.reweight", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--steps", type=count, nargs="+", default=[1, 4, 9], help="stochastic steps; default 1 4 9")
    p.add_argument("--batch", type=count, default=16, help="images in a pass; default 16")
    p.add_argument("--rounds", type=count, default=5, help="iterations of each kind; default 5")
    p.add_argument("--json", type=Path, metavar="FILE", help="write what was measured here")
    return p


def main(argv: list[str] | None = None) -> int:
    options = parser().parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    document: dict[str, Any] = {"environment": report.environment(device), "results": []}
    for steps in options.steps:
        result = measure(settings(steps, options.batch), options.rounds)
        document["results"].append(result)
        one, other = result["seconds"].values()
        print(f"{steps} of 10 steps: {one:.3g} s an iteration, reweighted {other:.3g} s, {result['speedup']:.3g} times")
        if options.json is not None:
            report.write(document, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
