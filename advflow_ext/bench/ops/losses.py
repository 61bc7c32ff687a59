"""Every loss, forward and backward, with the gradient of the policy velocity alone."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
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
from advflow_ext.bench.ops.scheduler import Scheduler
from advflow_ext.conformance.advantage_flow import advantage_flow_loss
from advflow_ext.conformance.awm import awm_loss
from advflow_ext.conformance.diffusion_nft import diffusion_nft_loss
from advflow_ext.conformance.flow_awr import flow_awr_loss
from advflow_ext.conformance.flow_cps import flow_cps_loss
from advflow_ext.conformance.flow_grpo import flow_grpo_loss
from advflow_ext.conformance.grpo_guard import grpo_guard_loss
from advflow_ext.conformance.orw_cfm import orw_cfm_loss
from advflow_ext.conformance.rollout import log_prob, log_prob_without_variance, shifted_twice
from advflow_ext.conformance.rows import column
from advflow_ext.conformance.unirl import flow_dppo_loss

TRAINING: Shape = (8, 16, 64, 64)
AUTOTUNE = "max-autotune-no-cudagraphs"
KL_WEIGHT = 0.04  # of the reverse process


def plain_advantage_flow(
    v: Tensor,
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    advantages: Tensor,
    *,
    v_old: Tensor,
    v_ref: Tensor | None,
    gamma: float,
    lam: float,
) -> Tensor:
    """The loss as a trainer would write it: no checks, no metrics, no care for non-finite samples."""

    def deviation(anchor: Tensor) -> Tensor:
        return (v.float() - anchor).square().flatten(1).mean(1)

    loss = advantages * deviation(noise.float() - x0.float()) + gamma * deviation(v_old.float())
    if v_ref is not None:
        loss = loss + lam * deviation(v_ref.float())
    return (t.square() * loss).mean()


def with_gradient(loss: Callable[[Arguments], Tensor]) -> Callable[[Arguments], Result]:
    def run(arguments: Arguments) -> Result:
        value = loss(arguments)
        (grad,) = torch.autograd.grad(value, arguments.call["v"])
        return value.detach(), grad

    return run


def widened_call(arguments: Arguments) -> dict[str, Any]:
    """The same numbers in float64, v as a leaf."""

    def wide(value: Any) -> Any:
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.detach().double() if floating else value

    call = {name: wide(value) for name, value in arguments.call.items()}
    call["v"].requires_grad_()
    return call


@dataclass(frozen=True)
class Loss:
    """``af.NAME`` with ``options``; the subclasses draw its inputs."""

    name: str
    source: str  # of the published form, one of conformance's SOURCES
    published: Callable[..., Tensor]
    options: dict[str, Any]
    shapes: list[Shape] = field(default_factory=lambda: [TRAINING])
    refs: tuple[bool | None, ...] = (False, True)
    plain: Callable[..., Tensor] | None = None
    reads_back = False  # whether the published form waits for the device

    def arguments(self, case: Case, device: torch.device, seed: int) -> Arguments:
        raise NotImplementedError

    def published_value(self, arguments: Arguments) -> Tensor:
        raise NotImplementedError

    def bytes_moved(self, case: Case) -> int:
        """Every input read once for the loss and once for the gradient, the gradient written once."""
        inputs = self.inputs + (1 if case.with_ref else 0)
        return (2 * inputs + 1) * latent_bytes(case)

    inputs = 0  # of the latents' shape, v_ref not counted

    def implementations(self, device: torch.device) -> dict[str, Implementation]:
        ours, reference = getattr(af, self.name), getattr(af.reference, self.name)

        def of(loss: Callable[..., Tensor], standard: str = "baseline") -> Implementation:
            return Implementation(with_gradient(lambda arguments: loss(**arguments.call)), standard)

        def reference_value(**call: Any) -> Tensor:
            value: Tensor = reference(**call).loss
            return value

        found = {
            OURS: of(lambda **call: ours(**call).loss, OURS),
            "eager": of(reference_value),
            "public": Implementation(
                with_gradient(self.published_value), standard="public", capturable=not self.reads_back
            ),
            "compile": of(torch.compile(reference_value, dynamic=False)),
        }
        if device.type == "cuda":
            found[MAX_AUTOTUNE] = of(torch.compile(reference_value, dynamic=False, mode=AUTOTUNE))
        if self.plain is not None:
            found["plain eager"] = of(self.plain)
            found["plain compile"] = of(torch.compile(self.plain, dynamic=False))
        return found

    def truth(self, arguments: Arguments) -> Truth:
        call = widened_call(arguments)
        losses = getattr(af.reference, self.name)(**call, reduction="none").loss
        (grad,) = torch.autograd.grad(losses.mean(), call["v"])
        losses = losses.detach()
        return Truth(losses.mean(), losses.abs().mean(), grad)

    def check(self, case: Case, arguments: Arguments, truth: Truth, result: Result, standard: str) -> Check:
        return compare(DTYPES[case.dtype], truth, result, standard)


@functools.cache
def step_table(sampler: str, noise_level: float) -> af.StepTable:
    """One for all calls, as in a trainer; compiled code is compiled for it."""
    return af.StepTable(shifted_twice(10), sampler=sampler, noise_level=noise_level)


def generator(device: torch.device, seed: int) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


@dataclass(frozen=True)
class ForwardLoss(Loss):
    anchor: str | None = "v_old"
    takes: tuple[str, ...] = ()  # of v, x0, noise, x_t, t, what the published form takes, in order
    target: str = "advantages"

    @property
    def inputs(self) -> int:  # type: ignore[override]
        return 3 + (self.anchor is not None)

    def arguments(self, case: Case, device: torch.device, seed: int) -> Arguments:
        random = generator(device, seed)
        dtype, batch = DTYPES[case.dtype], case.shape[0]

        def latent() -> Tensor:
            return torch.randn(case.shape, generator=random, device=device).to(dtype)

        def uniform(low: float, high: float) -> Tensor:
            return low + (high - low) * torch.rand(batch, generator=random, device=device)

        call: dict[str, Any] = {"v": latent().requires_grad_(), "x0": latent(), "noise": latent()}
        call["t"] = uniform(0.05, 1.0)
        call[self.target] = uniform(0.0, 1.0) if self.target == "rewards" else uniform(-1.0, 1.0)
        if self.anchor is not None:
            call[self.anchor] = latent()
        call["v_ref"] = latent() if case.with_ref else None
        t = column(call["t"], call["x0"])
        mixed = (1 - t) * call["x0"].float() + t * call["noise"].float()  # the network has seen it, so it is there
        options = self.options
        if not case.with_ref and "kl_weight" in options:
            options = options | {"kl_weight": 0.0}
        return Arguments(call | options, {"x_t": mixed, self.target: call[self.target].double()})

    def published_value(self, arguments: Arguments) -> Tensor:
        given = arguments.call | arguments.public
        return self.published(**{name: given[name] for name in (*self.takes, "v_ref", *self.options)})


@dataclass(frozen=True)
class ReverseLoss(Loss):
    sampler: str = "flow_sde"
    noise_level: float = 0.7
    one_step: bool = False  # trainers that average sigma over the batch train one step at a time
    step: Callable[..., tuple[Tensor, ...]] = Scheduler.flow_sde_in_parts  # what the published form calls
    keeps_mean: bool = False
    kl_options: dict[str, Any] = field(default_factory=dict)  # of ours, beside v_ref
    inputs = 3
    reads_back = True

    def arguments(self, case: Case, device: torch.device, seed: int) -> Arguments:
        random = generator(device, seed)
        dtype, batch = DTYPES[case.dtype], case.shape[0]

        def latent() -> Tensor:
            return torch.randn(case.shape, generator=random, device=device)

        # Far enough from the rollout policy that clips are decided well outside the rounding of log-probabilities.
        v_old = latent().to(dtype)
        v = (v_old.float() + 0.1 * latent()).to(dtype)
        eps, x = latent().to(dtype), latent().to(dtype)
        table = step_table(self.sampler, self.noise_level)
        trained = torch.full((batch,), 3) if self.one_step else torch.arange(batch) % 9
        index = trained.to(device)
        advantages = 2 * torch.rand(batch, generator=random, device=device) - 1
        call = {
            "v": v.requires_grad_(),
            "v_old": v_old,
            "eps": eps,
            "table": table,
            "index": index,
            "advantages": advantages,
            "v_ref": latent().mul_(0.1).add_(v_old).to(dtype) if case.with_ref else None,
        }

        step = table.rows(index, torch.float64)
        c_x, c_v, sigma = (column(each, x).float() for each in step[:3])
        x_next = c_x * x.float() + c_v * v_old.float() + sigma * eps.float()
        scheduler = Scheduler(table.sigmas, device)
        rollout: dict[str, Any] = {"x": x, "timesteps": scheduler.timesteps[index], "noise_level": self.noise_level}
        density = log_prob_without_variance if self.sampler == "cps" else log_prob
        drawn_from = (scheduler.cps if self.sampler == "cps" else scheduler.flow_sde)(v_old, **rollout)
        transition: dict[str, Any] = {
            "step": functools.partial(self.step, scheduler, **rollout),
            "x_next": x_next,
            "log_prob_old": density(x_next, drawn_from),
            "advantages": advantages.double(),
        }
        if self.keeps_mean:
            transition["mean_old"] = drawn_from[0]
        if case.with_ref:
            call |= {"kl_weight": KL_WEIGHT, **self.kl_options}
        return Arguments(call | self.options, transition | self.options | {"kl_weight": KL_WEIGHT})

    def published_value(self, arguments: Arguments) -> Tensor:
        return self.published(v=arguments.call["v"], v_ref=arguments.call["v_ref"], **arguments.public)


LOSSES: tuple[Loss, ...] = (
    ForwardLoss(
        "advantage_flow_loss", "AdvantageFlow", advantage_flow_loss, {"gamma": 1.1, "lam": 1e-3},
        shapes=[TRAINING, (9, 16, 64, 64), (8, 1024, 64)], plain=plain_advantage_flow,
        takes=("v", "x0", "x_t", "t", "advantages", "v_old"),
    ),
    ForwardLoss(
        "diffusion_nft_loss", "DiffusionNFT", diffusion_nft_loss, {"beta": 1.0, "adv_clip_max": 5.0, "kl_weight": 1e-4},
        takes=("v", "x0", "x_t", "t", "advantages", "v_old"),
    ),
    ForwardLoss(
        "awm_loss", "AWM", awm_loss, {"clip": 1.0, "ema_weight": 1.0, "kl_weight": 3e-3}, anchor="v_ema",
        takes=("v", "x0", "noise", "t", "advantages", "v_ema"),
    ),
    ForwardLoss(
        "flow_awr_loss", "FlowAWR", flow_awr_loss, {"kl_weight": 1e-4},
        takes=("v", "x0", "x_t", "t", "advantages", "v_old"),
    ),
    ForwardLoss(
        "reward_weighted_loss", "ORW-CFM", orw_cfm_loss, {"tau": 0.5, "kl_weight": 1.0}, anchor=None,
        target="rewards", takes=("v", "x0", "noise", "rewards"),
    ),
    ReverseLoss("flow_grpo_loss", "flow_grpo", flow_grpo_loss, {"clip": 1e-4}, kl_options={"kl_convention": "dt"}),
    ReverseLoss(
        "grpo_guard_loss", "GRPO-Guard (flow_grpo)", grpo_guard_loss, {"clip": 2e-6}, one_step=True, keeps_mean=True
    ),
    ReverseLoss(
        "flow_cps_loss", "FlowCPS", flow_cps_loss, {"clip": 1e-4}, kl_options={"kl_convention": "two_sigma_squared"},
        sampler="cps", noise_level=0.8, step=Scheduler.cps,
    ),
    ReverseLoss(
        "flow_dppo_loss", "UniRL Flow-DPPO", flow_dppo_loss, {"threshold": 1e-6}, step=Scheduler.flow_sde,
        keeps_mean=True,
    ),
)  # fmt: skip
