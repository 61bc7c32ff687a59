"""How much of a method's gradient is signal: the share of it that repeats from one rollout to the next.

python -m bench.learning.gradient_signal --rollouts 40 --json OUT advantage_flow "flow_grpo --rollout.steps 4"

Each argument is what would follow `advflow train --config tiny --algorithm`. The base policy draws that many
independent rollouts, g_i is the gradient of one whole iteration on rollout i, and

    share = mean over i != j of <g_i, g_j>  /  mean over i of <g_i, g_i>

which is 1 without noise and 0 for noise alone. It is given for gradients divided, parameter by parameter, by their root
mean square over the rollouts, as Adam divides them, over all parameters and over two parts of the transformer: what the
text passes through, and what sees the image alone.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from advflow.core.progress import show_progress
from advflow.run.trainer import Trainer
from advflow.settings.config import TrainConfig
from advflow.settings.sources import resolve_configs, to_config, train_parser
from torch import Tensor

from advflow_ext.bench.harness import report

# Parts of the transformer that the prompt's tokens or its pooled embedding pass through.
TEXT = ("context", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "norm_added", "time_text_embed")
FIRST_ROLLOUT = 100  # any iteration no run begins with


@dataclass(frozen=True)
class Signal:
    """The share, its standard error by leaving out one rollout at a time, and how many parameters it is over."""

    share: float
    standard_error: float
    parameters: int


def signal(gradients: Tensor) -> Signal:
    """`gradients` [K, P], one a rollout."""
    gram = _normalised_gram(gradients)
    rest = [_share(_without(gram, i)) for i in range(len(gram))]
    spread = torch.tensor(rest).var(correction=0).item() * (len(gram) - 1)
    return Signal(_share(gram), math.sqrt(spread), gradients.shape[1])


def _normalised_gram(gradients: Tensor) -> Tensor:
    scale = gradients.double().square().mean(0).sqrt()
    normalised = gradients.double() / torch.where(scale > 0, scale, 1)
    return normalised @ normalised.T


def _share(gram: Tensor) -> float:
    count = len(gram)
    between = (gram.sum() - gram.diagonal().sum()) / (count * (count - 1))
    return float(between / gram.diagonal().mean())


def _without(gram: Tensor, i: int) -> Tensor:
    kept = [j for j in range(len(gram)) if j != i]
    return gram[kept][:, kept]


def gradients(trainer: Trainer, rollouts: int, label: str) -> tuple[dict[str, Tensor], float]:
    """The gradients [K, ...] of each parameter, and the mean reward of the rollouts."""
    names = [name for name, parameter in trainer.policies.transformer("learner").named_parameters()]
    parameters = dict(trainer.policies.transformer("learner").named_parameters())
    found: dict[str, list[Tensor]] = {name: [] for name in names if parameters[name].requires_grad}
    rewards = []
    for i in show_progress(range(FIRST_ROLLOUT, FIRST_ROLLOUT + rollouts), desc=label):
        rollout, row = trainer.roll_out(i)
        rewards.append(row["reward"])
        for losses in trainer.process.steps(i, rollout):
            for loss in losses:
                (loss.out.loss * loss.weight).backward()
        for name, each in found.items():
            grad = parameters[name].grad
            each.append((torch.zeros_like(parameters[name]) if grad is None else grad).flatten().clone())
        trainer.optimizer.zero_grad(set_to_none=True)
    return {name: torch.stack(each) for name, each in found.items()}, sum(rewards) / rollouts


def measure(arguments: str, rollouts: int) -> dict[str, object]:
    started = time.process_time()
    found, reward = gradients(Trainer(_config(arguments)), rollouts, arguments)
    text = [name for name in found if any(part in name for part in TEXT)]
    groups = {"all": list(found), "text": text, "image": [name for name in found if name not in text]}
    shares = {group: asdict(signal(torch.cat([found[name] for name in names], 1))) for group, names in groups.items()}
    seconds = (time.process_time() - started) / rollouts
    return {"run": arguments, "rollouts": rollouts, "reward": reward, "cpu_seconds_a_rollout": seconds, "share": shares}


def _config(arguments: str) -> TrainConfig:
    words = resolve_configs(["train", "--config", "tiny", "--algorithm", *arguments.split()])
    parser = train_parser()
    return to_config(parser, parser.parse_args(words[1:]))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.learning.gradient_signal",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", metavar="METHOD", help="a method, with options of advflow train if wanted")
    parser.add_argument("--rollouts", type=int, default=40, help="independent rollouts; default 40")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the numbers here")
    options = parser.parse_args(argv)
    if options.rollouts < 3:
        parser.error(f"--rollouts {options.rollouts}: 3 or more are needed")
    results = []
    print(f"{'share of signal, +- standard error':60}{'all':>16}{'text':>16}{'image':>16}{'s a rollout':>13}")
    for arguments in options.runs:
        result = measure(arguments, options.rollouts)
        results.append(result)
        shares = result["share"]
        assert isinstance(shares, dict)
        cells = "".join(f"{each['share']:>8.4f} +- {each['standard_error']:.4f}" for each in shares.values())
        print(f"{arguments:60}{cells}{result['cpu_seconds_a_rollout']:>12.2f}", flush=True)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        document = {"environment": report.environment(torch.device("cpu")), "results": results}
        options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
