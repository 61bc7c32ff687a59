"""The three kernels alone, which are held against a copy of the same bytes, and the sampler step as it is called."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._inductor import list_mode_options

import advflow_ext as af
from advflow_ext import _native
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
    elements,
    latent_bytes,
    limits,
)
from advflow_ext.bench.ops.losses import AUTOTUNE, TRAINING, generator, step_table
from advflow_ext.bench.ops.scheduler import Scheduler
from advflow_ext.conformance.rollout import log_prob
from advflow_ext.conformance.rows import column, mean
from advflow_ext.kernels.sde_step import sde_step_op

NOISE_LEVEL = 0.7
# A compiler drops a rounding that is widened again at once; the score would be that of an x that is not returned.
ROUNDING: dict[str, Any] = {"emulate_precision_casts": True}


def latents(case: Case, device: torch.device, seed: int, count: int) -> list[Tensor]:
    random = generator(device, seed)
    return [torch.randn(case.shape, generator=random, device=device).to(DTYPES[case.dtype]) for _ in range(count)]


class Kernel:
    """An op of its own, without checks, autograd or scalars around it."""

    shapes: list[Shape] = [TRAINING]
    refs: tuple[bool | None, ...] = (None,)
    source: str | None = None
    moved = 0  # tensors of the latents' shape, read and written

    def bytes_moved(self, case: Case) -> int:
        return self.moved * latent_bytes(case)

    def arguments(self, case: Case, device: torch.device, seed: int) -> Arguments:
        raise NotImplementedError

    def ours(self, arguments: Arguments) -> Result:
        raise NotImplementedError

    def plain(self, arguments: Arguments, dtype: torch.dtype) -> Result:
        """The same in plain PyTorch, computed in ``dtype``."""
        raise NotImplementedError

    def implementations(self, device: torch.device) -> dict[str, Implementation]:
        return {
            OURS: Implementation(self.ours, OURS),
            "eager": Implementation(lambda arguments: self.plain(arguments, torch.float32)),
        }

    def truth(self, arguments: Arguments) -> Truth:
        numbers, tensor = self.plain(arguments, torch.float64)
        return Truth(numbers, numbers.abs().mean() if numbers.numel() else numbers.new_ones(()), tensor)

    def check(self, case: Case, arguments: Arguments, truth: Truth, result: Result, standard: str) -> Check:
        return compare(DTYPES[case.dtype], truth, result, standard)


class ResidualStats(Kernel):
    """The statistics of a forward-process loss with all its anchors: five tensors read."""

    moved = 5

    def arguments(self, case: Case, device: torch.device, seed: int) -> Arguments:
        return Arguments(dict(zip(("v", "x0", "noise", "v_old", "v_ref"), latents(case, device, seed, 5), strict=True)))

    def ours(self, arguments: Arguments) -> Result:
        stats = torch.ops.advflow.residual_stats.default(*arguments.call.values(), 0.0)
        return stats[:, :4], stats.new_empty(0)

    def plain(self, arguments: Arguments, dtype: torch.dtype) -> Result:
        v, x0, noise, v_old, v_ref = (tensor.to(dtype) for tensor in arguments.call.values())
        u = noise - x0
        squares = [mean(residual.square()) for residual in (v - u, v - v_old, v - v_ref, v_old - u)]
        return torch.stack(squares, 1), v.new_empty(0)


class ResidualGrad(ResidualStats):
    """Its gradient: five tensors read, one written."""

    moved = 6

    def arguments(self, case: Case, device: torch.device, seed: int) -> Arguments:
        given = super().arguments(case, device, seed).call
        return Arguments(
            given | {"coef": torch.randn(case.shape[0], 3, generator=generator(device, seed + 1), device=device)}
        )

    def ours(self, arguments: Arguments) -> Result:
        grad = torch.ops.advflow.residual_grad.default(*arguments.call.values(), None)
        return grad.new_empty(0), grad

    def plain(self, arguments: Arguments, dtype: torch.dtype) -> Result:
        v, x0, noise, v_old, v_ref, coef = (tensor.to(dtype) for tensor in arguments.call.values())
        a, b, c = (column(each, v) for each in coef.unbind(1))
        grad = (a * (v - (noise - x0)) + b * (v - v_old) + c * (v - v_ref)) * (2 / v[0].numel())
        return grad.new_empty(0), grad if dtype == torch.float64 else grad.to(arguments.call["v"].dtype)


def affine_step(arguments: Arguments) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the next x in float64."""
    call = arguments.call
    rows = call["coef"].double() if "coef" in call else call["table"].columns(call["index"], torch.float64)
    c_x, c_v, sigma = (column(each, call["x"]) for each in rows.unbind(1)[:3])
    return c_x * call["x"].double() + c_v * call["v"].double(), sigma


class SdeStepKernel(Kernel):
    """One sampler step with given noise: three tensors read, the next x written, and its noise in float32."""

    def bytes_moved(self, case: Case) -> int:
        return 4 * latent_bytes(case) + 4 * elements(case)

    def arguments(self, case: Case, device: torch.device, seed: int) -> Arguments:
        v, x, noise = latents(case, device, seed, 3)
        table = step_table("flow_sde", NOISE_LEVEL)
        coef = table.columns((torch.arange(case.shape[0]) % 9).to(device))[:, :3].contiguous()
        return Arguments({"v": v, "x": x, "coef": coef, "noise": noise})

    def ours(self, arguments: Arguments) -> Result:
        call = arguments.call
        if _native.module is None:
            raise RuntimeError("advflow_ext has no compiled module")
        x_next, _, deviation_sq = sde_step_op(call["v"], call["x"], call["coef"], call["noise"], None, None)
        return deviation_sq, x_next

    def plain(self, arguments: Arguments, dtype: torch.dtype) -> Result:
        call = arguments.call
        c_x, c_v, sigma = (column(each, call["x"]) for each in call["coef"].to(dtype).unbind(1))
        mu = c_x * call["x"].to(dtype) + c_v * call["v"].to(dtype)
        exact = mu + sigma * call["noise"].to(dtype)
        x_next = exact if dtype == torch.float64 else exact.to(call["x"].dtype)
        return mean((x_next.to(dtype) - mu).square()), x_next

    def check(self, case: Case, arguments: Arguments, truth: Truth, result: Result, standard: str) -> Check:
        """<(x_next - mean)^2> is that of the x that was returned, which is rounded."""
        mu, _ = affine_step(arguments)
        explained = mean((result[1].double() - mu).square())
        return compare(DTYPES[case.dtype], Truth(explained, truth.size, truth.latents), result, standard)


class SdeStep:
    """``af.sde_step`` with noise of its own: two tensors read, the next x and its noise written."""

    shapes: list[Shape] = [TRAINING]
    refs: tuple[bool | None, ...] = (None,)
    source: str | None = "flow_grpo"

    def arguments(self, case: Case, device: torch.device, seed: int) -> Arguments:
        v, x = latents(case, device, seed, 2)
        table = step_table("flow_sde", NOISE_LEVEL)
        index = (torch.arange(case.shape[0]) % 9).to(device)
        scheduler = Scheduler(table.sigmas, device)
        held = {"scheduler": scheduler, "timesteps": scheduler.timesteps[index]}
        return Arguments({"v": v, "x": x, "table": table, "index": index}, held)

    def bytes_moved(self, case: Case) -> int:
        return 3 * latent_bytes(case) + 4 * elements(case)  # eps is float32

    def implementations(self, device: torch.device) -> dict[str, Implementation]:
        def of(step: Callable[..., af.SdeStep], standard: str = "baseline") -> Implementation:
            def run(arguments: Arguments) -> Result:
                x_next, _, log_prob = step(**arguments.call)
                return log_prob, x_next

            return Implementation(run, standard)

        def published(arguments: Arguments) -> Result:
            call, held = arguments.call, arguments.public
            with torch.no_grad():
                mu, std = held["scheduler"].flow_sde(call["v"], call["x"], held["timesteps"], NOISE_LEVEL)
                x_next = mu + std * torch.randn_like(mu)
                return log_prob(x_next, (mu, std)), x_next

        found = {
            OURS: of(af.sde_step, OURS),
            "eager": of(af.reference.sde_step),
            "public": Implementation(published, standard="public", capturable=False),
            "compile": of(torch.compile(af.reference.sde_step, dynamic=False, options=ROUNDING)),
        }
        if device.type == "cuda":
            tuned = ROUNDING | list_mode_options(AUTOTUNE)
            found[MAX_AUTOTUNE] = of(torch.compile(af.reference.sde_step, dynamic=False, options=tuned))
        return found

    def truth(self, arguments: Arguments) -> Truth:
        """The mean of the next x: what is random has no truth, and is held against its own distribution."""
        mu, sigma = affine_step(arguments)
        size = 0.5 + sigma.log().abs().mean() + math.log(2 * math.pi) / 2
        return Truth(mu.new_empty(0), size, mu)

    def check(self, case: Case, arguments: Arguments, truth: Truth, result: Result, standard: str) -> Check:
        """The log-probability is that of the x that was returned; the noise that explains it is standard normal."""
        log_prob, x_next = result
        mu, sigma = affine_step(arguments)
        eps = (x_next.double() - mu) / sigma
        expected = -mean(eps.square()) / 2 - sigma.flatten().log() - math.log(2 * math.pi) / 2
        beyond_chance = 6 / math.sqrt(eps.numel())
        excess = torch.stack([eps.mean().abs(), (eps.square().mean() - 1).abs() / math.sqrt(2)]) - beyond_chance
        numbers_limit, latents_limit = limits(DTYPES[case.dtype], standard)
        return Check(
            float((log_prob.double() - expected).abs().amax() / truth.size),
            float(excess.amax().clamp(min=0)),
            numbers_limit,
            latents_limit,
        )


KERNELS = {"residual_stats": ResidualStats(), "residual_grad": ResidualGrad(), "sde_step_kernel": SdeStepKernel()}
