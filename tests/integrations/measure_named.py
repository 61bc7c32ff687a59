"""What an install changes in flow_grpo, DanceGRPO, MixGRPO: `PEERS=folder python -m tests.integrations.measure_named`.

One thread, CPU time, so that another process on the machine does not count. docs/drop-in.md has what it prints.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from advflow_ext.conformance import rollout
from tests.integrations.counting import Count
from tests.integrations.measure import CLIP, begin_table, least, row
from tests.integrations.named_steps import NAMED, Named, load_checkout

A = torch.linspace(-1, 3, 8)  # no mean of 0, beside which a loss has no size


def main() -> None:
    begin_table()
    for name in sys.argv[1:] or [name for name, named in NAMED.items() if named.checkout]:
        with pytest.MonkeyPatch.context() as monkeypatch:
            load_checkout(monkeypatch, NAMED[name])
            cells = row(NAMED[name].integration, partial(figures, NAMED[name]))
            print(f"| {name} | {cells} |", flush=True)


def figures(named: Named) -> dict[str, Any]:
    """Of one update of the clipped loss: a stored step of eight samples, replayed by a policy that moved a little."""
    index = named.steps.repeat(2)
    generator = torch.Generator().manual_seed(3)
    v, x, change, noise = torch.randn(4, 8, *named.shape, generator=generator)
    v_old, v_new = v.to(named.dtype), (v + 1e-3 * change).to(named.dtype)
    drawn = named(index, v_old, x)
    with torch.no_grad():
        mean, _ = named.truth(v_old, x, x, index)
        x_next = (mean + 0.1 * noise).float()
    old = named(index, v_old, x, x_next).log_prob

    def update() -> tuple[Tensor, Tensor, Tensor]:
        leaf = v_new.clone().requires_grad_()
        log_prob = named(index, leaf, x, x_next).log_prob
        loss = rollout.clipped((log_prob - old).exp(), A, CLIP)
        return log_prob.detach(), loss.detach(), torch.autograd.grad(loss, leaf)[0]

    log_prob, loss, gradient = update()
    with Count(x.numel()) as count:
        update()
    leaf = v_new.double().requires_grad_()
    ratio = named.truth(leaf, x, x_next, index)[1] - named.truth(v_old, x, x_next, index)[1]
    (exact,) = torch.autograd.grad(rollout.clipped(ratio.exp(), A, CLIP), leaf)
    return {
        "x_next": drawn.x_next,
        "mean": drawn.x_next if drawn.mean is None else drawn.mean,
        "log_prob": log_prob,
        "loss": loss,
        "gradient": gradient,
        "gradient error": float((gradient - exact).norm() / exact.norm()),
        "log-ratio error": float(((log_prob.double() - old.double()) - ratio).abs().max()),
        "count": count,
        "seconds": least(update),
    }


if __name__ == "__main__":
    main()
