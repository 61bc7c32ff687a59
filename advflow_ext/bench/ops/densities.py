"""Log-probabilities by themselves, with their gradient: what trainers call that subtract one from another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import advflow_ext as af
from advflow_ext.bench.harness.registry import (
    DTYPES,
    MAX_AUTOTUNE,
    OURS,
    Arguments,
    Case,
    Check,
    Implementation,
    Result,
    Shape,
    Truth,
    compare,
    latent_bytes,
)
from advflow_ext.bench.ops.kernels import NOISE_LEVEL
from advflow_ext.bench.ops.losses import AUTOTUNE, TRAINING, generator, step_table, widened_call
from advflow_ext.bench.ops.scheduler import Scheduler
from advflow_ext.conformance.awm import awm_log_prob
from advflow_ext.conformance.rollout import log_prob
from advflow_ext.conformance.rows import column


def with_gradient(density: Callable[[Arguments], Tensor]) -> Callable[[Arguments], Result]:
    def run(arguments: Arguments) -> Result:
        values = density(arguments)
        (grad,) = torch.autograd.grad(values.sum(), arguments.call["v"])
        return values.detach(), grad

    return run


class Density:
    """``af.NAME``, forward and backward: three tensors read twice, the gradient written."""

    shapes: list[Shape] = [TRAINING]
    refs: tuple[bool | None, ...] = (None,)
    name: str
    source: str
    reads_back = False  # whether the published form waits for the device

    def arguments(self, case: Case, device: torch.device, seed: int) -> Arguments:
        raise NotImplementedError

    def published(self, arguments: Arguments) -> Tensor:
        raise NotImplementedError

    def bytes_moved(self, case: Case) -> int:
        return 7 * latent_bytes(case)

    def implementations(self, device: torch.device) -> dict[str, Implementation]:
        ours, reference = getattr(af, self.name), getattr(af.reference, self.name)

        def of(density: Callable[..., Tensor], standard: str = "baseline") -> Implementation:
            return Implementation(with_gradient(lambda arguments: density(**arguments.call)), standard)

        found = {
            OURS: of(ours, OURS),
            "eager": of(reference),
            "public": Implementation(with_gradient(self.published), "public", capturable=not self.reads_back),
            "compile": of(torch.compile(reference, dynamic=False)),
        }
        if device.type == "cuda":
            found[MAX_AUTOTUNE] = of(torch.compile(reference, dynamic=False, mode=AUTOTUNE))
        return found

    def truth(self, arguments: Arguments) -> Truth:
        call = widened_call(arguments)
        values = getattr(af.reference, self.name)(**call)
        (grad,) = torch.autograd.grad(values.sum(), call["v"])
        return Truth(values.detach(), values.detach().abs().mean(), grad)

    def check(self, case: Case, arguments: Arguments, truth: Truth, result: Result, standard: str) -> Check:
        return compare(DTYPES[case.dtype], truth, result, standard)


class TransitionLogProb(Density):
    """Of a stored step, as flow_grpo's ``sde_step_with_logprob`` gives it to the learner."""

    name, source, reads_back = "transition_log_prob", "flow_grpo", True

    def arguments(self, case: Case, device: torch.device, seed: int) -> Arguments:
        random = generator(device, seed)

        def latent() -> Tensor:
            return torch.randn(case.shape, generator=random, device=device)

        table = step_table("flow_sde", NOISE_LEVEL)
        index = (torch.arange(case.shape[0]) % 9).to(device)
        v, x, dtype = latent(), latent(), DTYPES[case.dtype]
        c_x, c_v, sigma = (column(each, x).float() for each in table.rows(index, torch.float64)[:3])
        x_next = (c_x * x + c_v * v + sigma * latent()).to(dtype)
        scheduler = Scheduler(table.sigmas, device)
        call: dict[str, Any] = {"v": v.to(dtype).requires_grad_(), "x": x.to(dtype), "x_next": x_next}
        held = {"scheduler": scheduler, "timesteps": scheduler.timesteps[index]}
        return Arguments(call | {"table": table, "index": index}, held)

    def published(self, arguments: Arguments) -> Tensor:
        call, held = arguments.call, arguments.public
        gaussian = held["scheduler"].flow_sde(call["v"], call["x"], held["timesteps"], NOISE_LEVEL)
        return log_prob(call["x_next"].float(), gaussian)


class AwmLogProb(Density):
    """The matching error as a log-probability."""

    name, source = "awm_log_prob", "AWM"

    def arguments(self, case: Case, device: torch.device, seed: int) -> Arguments:
        random = generator(device, seed)

        def latent() -> Tensor:
            return torch.randn(case.shape, generator=random, device=device).to(DTYPES[case.dtype])

        t = 0.05 + 0.95 * torch.rand(case.shape[0], generator=random, device=device)
        return Arguments({"v": latent().requires_grad_(), "x0": latent(), "noise": latent(), "t": t})

    def published(self, arguments: Arguments) -> Tensor:
        return awm_log_prob(**arguments.call)


DENSITIES: dict[str, Density] = {density.name: density for density in (TransitionLogProb(), AwmLogProb())}
