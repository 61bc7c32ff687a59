"""What an install changes on the real trainers: `PEERS=folder python -m tests.integrations.measure`.

One thread, CPU time, so that another process on the machine does not count. docs/drop-in.md has what it prints.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.integrations import test_unirl
from tests.integrations.counting import Count, as_on_a_device
from tests.integrations.stand_ins.gaussians import log_density, transition
from tests.integrations.steps_of_trainers import LEVELS, SIGMAS, TRAINERS, Trainer

SIZE, INDEX = (8, 16, 64, 64), torch.arange(8)
CLIP, REPEATS = 1e-4, 7


def main() -> None:
    wanted = sys.argv[1:] or list(TRAINERS)
    begin_table()
    for name in wanted:
        with pytest.MonkeyPatch.context() as monkeypatch:
            TRAINERS[name].load(monkeypatch, "real")
            for sampler in LEVELS:
                cells = row(TRAINERS[name].integration, partial(figures, TRAINERS[name], sampler))
                print(f"| {name} {sampler} | {cells} |", flush=True)
    if "unirl" in wanted:
        flow_dppo()


def begin_table() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(
        "| step | next x, mean | log-prob | loss | gradient | to fp64: gradient, log-ratio | operators | reads | ms |"
    )
    print("|---|---|---|---|---|---|---|---|---|")


def row(integration: ModuleType, figures: Callable[[], dict[str, Any]]) -> str:
    """A row of the table, of `figures` before the integration is installed and after."""
    before = figures()
    integration.install()
    with pytest.MonkeyPatch.context() as monkeypatch:
        as_on_a_device(monkeypatch)
        after = figures()
    integration.uninstall()
    parts = ["x_next", "mean"], ["log_prob"], ["loss"], ["gradient"]
    cells = [", ".join(f"{largest(before[key], after[key]):.1e}" for key in keys) for keys in parts]
    return " | ".join([
        *cells,
        " -> ".join(f"{each['gradient error']:.1e}, {each['log-ratio error']:.1e}" for each in (before, after)),
        " -> ".join(f"{each['count'].large}+{each['count'].small}" for each in (before, after)),
        " -> ".join(str(each["count"].reads) for each in (before, after)),
        " -> ".join(f"{1000 * each['seconds']:.1f}" for each in (before, after)),
    ])  # fmt: skip


def largest(theirs: Tensor, ours: Tensor) -> float:
    """The largest difference beside the largest number of theirs."""
    return float((theirs.double() - ours.double()).abs().max() / theirs.double().abs().max())


def figures(trainer: Trainer, sampler: str) -> dict[str, Any]:
    """Of one update of the trainer's own loss: a stored step, replayed by a policy that has moved a little."""
    generator = torch.Generator().manual_seed(3)
    v, x, change = torch.randn(3, *SIZE, generator=generator)
    A = torch.randn(len(INDEX), generator=generator)
    drawn = trainer.step(sampler, INDEX, v, x)
    x_next = stored(sampler, v, x)
    old = trainer.step(sampler, INDEX, v, x, x_next).log_prob

    def update() -> tuple[Any, Tensor, Tensor]:
        leaf = (v + 1e-4 * change).requires_grad_()
        found = trainer.step(sampler, INDEX, leaf, x, x_next)
        ratio = (found.log_prob - old).exp()
        loss = torch.maximum(-A * ratio, -A * ratio.clamp(1 - CLIP, 1 + CLIP)).mean()
        loss.backward()
        assert leaf.grad is not None
        return found, loss.detach(), leaf.grad

    found, loss, grad = update()
    with Count(x.numel()) as count:
        update()
    leaf = (v + 1e-4 * change).double().requires_grad_()
    exact = density(sampler, leaf, x, x_next) - density(sampler, v, x, x_next)
    bounded = exact.exp().clamp(1 - CLIP, 1 + CLIP)
    torch.maximum(-A * exact.exp(), -A * bounded).mean().backward()
    assert leaf.grad is not None
    return {
        "x_next": drawn.x_next, "mean": drawn.mean, "log_prob": found.log_prob.detach(), "loss": loss, "gradient": grad,
        "gradient error": float((grad - leaf.grad).norm() / leaf.grad.norm()),
        "log-ratio error": float(((found.log_prob.double() - old.double()) - exact).abs().max()),
        "count": count, "seconds": least(update),
    }  # fmt: skip


def gaussian(sampler: str, v: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    s, s_end = (SIGMAS.double()[places].view(-1, 1, 1, 1) for places in (INDEX, INDEX + 1))
    level = torch.tensor(LEVELS[sampler], dtype=torch.float64)
    mean, _, sigma = transition(sampler, v.double(), x.double(), s, s_end, level, SIGMAS.double()[1])
    return mean, sigma


def stored(sampler: str, v: Tensor, x: Tensor) -> Tensor:
    mean, sigma = gaussian(sampler, v, x)
    return (mean + sigma * torch.randn(SIZE, generator=torch.Generator().manual_seed(9))).float()


def density(sampler: str, v: Tensor, x: Tensor, x_next: Tensor) -> Tensor:
    mean, sigma = gaussian(sampler, v, x)
    return log_density(x_next.double(), mean, sigma, variance=sampler != "cps")


def least(call: Callable[[], object]) -> float:
    times = []
    for _ in range(REPEATS):
        start = time.thread_time()
        call()
        times.append(time.thread_time() - start)
    return min(times)


def flow_dppo() -> None:
    """UniRL's Flow-DPPO on a trajectory in bfloat16: transitions masked wrongly, and the gradient's error."""
    print("\n| Flow-DPPO of UniRL | masked in fp64 | masked wrongly | gradient | ms |\n|---|---|---|---|---|")
    with pytest.MonkeyPatch.context() as monkeypatch:
        TRAINERS["unirl"].load(monkeypatch, "real")
        for sampler in LEVELS:
            found = [one_flow_dppo(sampler, installed) for installed in (False, True)]
            cells = (
                " -> ".join(f"{each[k]:{shape}}" for each in found) for k, shape in ((1, "d"), (2, ".1e"), (3, ".0f"))
            )
            print(f"| {sampler} | {found[0][0]} of {48 * 4} | {' | '.join(cells)} |", flush=True)


def one_flow_dppo(sampler: str, installed: bool) -> tuple[int, int, float, float]:
    integration = TRAINERS["unirl"].integration
    kernels = sys.modules.get("unirl.sde.kernels") or __import__("unirl.sde.kernels", fromlist=["kernels"])
    segment, strategy, v_old = test_unirl.rollout(kernels, sampler)
    A = torch.randn(len(v_old), generator=torch.Generator().manual_seed(4))
    leaf = test_unirl.updated(v_old).requires_grad_()
    loss, masked = test_unirl.exact(segment, leaf, v_old, A, sampler)
    (slope,) = torch.autograd.grad(loss / 2, leaf)
    if installed:
        integration.install()
    algorithm = test_unirl.flow_dppo(strategy, v_old, sampler)
    algorithm.prepare_segment(conditions={}, segment=segment)

    def update() -> None:
        leaf.grad = None
        test_unirl.trained(algorithm, segment, leaf, A)

    seconds = least(update)
    integration.uninstall()
    assert leaf.grad is not None
    kept = leaf.grad.flatten(2).abs().sum(2) > 0
    error = float((leaf.grad - slope).norm() / slope.norm())
    return int(masked.sum()), int((kept == masked).sum()), error, 1000 * seconds


if __name__ == "__main__":
    main()
