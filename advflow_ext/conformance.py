"""``python -m advflow_ext.conformance``: which call here computes what a public trainer computes, and whether it does.

Each trainer's formula is written the way that trainer computes it (means of the next x, log-probabilities with their
constants, x0-predictions), in float64, from its public code at the commit named or from its paper. It shares the random
inputs with the call beside it and nothing else. Where a trainer departs from its own paper or sampler, the row says
how, and which option gives its number if one does.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import advflow_ext as af

TRANSITIONS, SHAPE, GROUP = 18, (4, 8, 8), 8
STEPS = torch.arange(TRANSITIONS)
GUARD_CLIP = 2e-6
AGREEING_DIGITS = 9.0  # a log-ratio of 1e-4 out of float64 log-probabilities of 1 keeps about 11

SOURCES = {
    "flow_grpo": "yifan123/flow_grpo @9745241",
    "FlowCPS": "IamCreateAI/FlowCPS @b402c7a",
    "DanceGRPO": "XueZeyue/DanceGRPO @15cc71d",
    "MixGRPO": "Tencent-Hunyuan/MixGRPO @e5cdd6a",
    "GRPO-Guard (flow_grpo)": "yifan123/flow_grpo @9745241",
    "GRPO-Guard (Flow-Factory)": "X-GenGroup/Flow-Factory @b30dc00",
    "GRPO-Guard (Flow-Factory), earlier": "X-GenGroup/Flow-Factory @a0b2bc5",
    "Flow-Factory": "X-GenGroup/Flow-Factory @a0b2bc5",
    "UniRL Flow-DPPO": "Tencent-Hunyuan/UniRL @0c97cfb",
    "UniRL Flow-DPPO, earlier": "Tencent-Hunyuan/UniRL @1a7b501",
    "Flow-DPPO paper": "arXiv 2606.11025",
    "verl-omni": "verl-project/verl-omni @a1139ba",
    "DiffusionNFT": "NVlabs/DiffusionNFT @24af555",
    "DiffusionNFT paper": "arXiv 2509.16117",
    "UniRL DiffusionNFT": "Tencent-Hunyuan/UniRL @02f9a4b",
    "AWM": "scxue/advantage_weighted_matching @be51372",
    "FlowAWR": "Fuzm7/FlowAWR @05e993a",
    "FlowAWR paper": "arXiv 2606.30376",
    "ORW-CFM": "markerthu/orw-cfm @de9c766",
    "AdvantageFlow": "arXiv 2605.26013",
    "MeanFlowAdvantage": "arXiv 2609.37670",
}

Loss = Callable[..., af.LossOutput]
Gaussian = tuple[Tensor, Tensor]  # mean of the next x, and its standard deviation [N, 1, 1, 1]


@dataclass(frozen=True)
class Row:
    """One quantity of one trainer: by our call, and by the trainer's formula."""

    trainer: str
    quantity: str
    call: str
    ours: tuple[Tensor, ...]
    theirs: tuple[Tensor, ...]
    departs: str = ""  # how the trainer departs from what the call computes, where it does

    @property
    def commit(self) -> str:
        """Of the code read: repository and commit, or the paper."""
        return SOURCES.get(self.trainer, "")

    @property
    def digits(self) -> float:
        """Leading digits that agree: of the worst element, relative to the largest one of its tensor; at most 16."""
        pairs = zip(self.ours, self.theirs, strict=True)
        errors = [float((ours - theirs).abs().max() / theirs.abs().max()) for ours, theirs in pairs]
        if not all(map(math.isfinite, errors)):  # also where all of theirs is 0: such a row would compare nothing
            return 0.0
        return min(16.0, -math.log10(max(*errors, 1e-16)))

    @property
    def agrees(self) -> bool:
        return self.digits >= AGREEING_DIGITS

    def to_json(self) -> dict[str, Any]:
        return {
            "trainer": self.trainer,
            "commit": self.commit,
            "quantity": self.quantity,
            "call": self.call,
            "ours": float(self.ours[0].flatten()[0]),
            "theirs": float(self.theirs[0].flatten()[0]),
            "digits": round(self.digits, 1),
            "agrees": self.agrees,
            "departs": self.departs,
        }


class Inputs:
    """The random numbers behind every row."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        latents = (TRANSITIONS, *SHAPE)
        self.x0, self.noise, self.x, self.step_noise = normal(4, *latents)
        self.u: Tensor = self.noise - self.x0
        self.v_old = self.u + 0.3 * normal(*latents)
        self.v, self.v_ref, self.v_ema = self.v_old + 0.02 * normal(3, *latents)
        self.t = torch.linspace(0.1, 1, TRANSITIONS, dtype=torch.float64)
        self.column_t = self.t.view(-1, *[1] * len(SHAPE))
        self.x_t = self.x0 + self.column_t * self.u
        self.A = normal(TRANSITIONS)
        self.rewards = 0.5 + 0.1 * normal(6, 1) + 0.1 * normal(6, GROUP)
        self.rewards[0, 3] += 5  # beyond five standard deviations, so that the clips have something to do
        self.rewards[5] = 0.5  # and a group that agrees, for the floors

    @property
    def centred(self) -> Tensor:
        return self.rewards - self.rewards.mean(1, keepdim=True)

    def forward(self, A: Tensor) -> tuple[Tensor, ...]:
        """What every forward-process loss takes first."""
        return self.v, self.x0, self.noise, self.t, A


def shown(op: Callable[..., Any], options: dict[str, Any]) -> str:
    words = [f"{name}={name if isinstance(value, Tensor) else repr(value)}" for name, value in options.items()]
    return f"{op.__name__}({', '.join(['...', *words])})"


def metric(out: af.LossOutput, name: str) -> Tensor:
    value: Tensor = out.metrics.values[out.metrics.names.index(name)]
    return value


def with_gradient(loss: Callable[[Tensor], Tensor], v: Tensor) -> tuple[Tensor, Tensor]:
    leaf = v.clone().requires_grad_()
    value = loss(leaf)
    (grad,) = torch.autograd.grad(value, leaf)
    return value.detach(), grad


def mean(values: Tensor) -> Tensor:
    """Over everything but the batch."""
    return values.flatten(1).mean(1)


# ---------------------------------------------------------------------------------------------------------------------
# Schedules, samplers and ratios, as the trainers write them


def shifted(s: Tensor, shift: float = 3.0) -> Tensor:
    return shift * s / (1 + (shift - 1) * s)


def shifted_once(steps: int) -> Tensor:
    """UniRL, DanceGRPO, MixGRPO; and Flow-Factory, which gives the scheduler of diffusers an unshifted grid."""
    return shifted(torch.linspace(1, 0, steps + 1, dtype=torch.float64))


def shifted_twice(steps: int) -> Tensor:
    """The Euler scheduler of diffusers with shift 3 given no grid, as flow_grpo runs it: the smallest sigma is shifted
    when the scheduler is built, and the grid between it and 1 once more in set_timesteps."""
    smallest = float(shifted(torch.tensor(1 / 1000, dtype=torch.float64)))
    grid = shifted(torch.linspace(1, smallest, steps, dtype=torch.float64))
    return torch.cat([grid, torch.zeros_like(grid[:1])])


def flow_sde(v: Tensor, x: Tensor, s: Tensor, following: Tensor, a: float, at_one: Tensor) -> Gaussian:
    """flow_grpo's ``std_dev_t`` lacks the sqrt(-dt) that its noise has; what is returned here has it."""
    dt = following - s
    std_dev_t = a * (s / (1 - torch.where(s == 1, at_one, s))).sqrt()
    drift_x, drift_v = std_dev_t**2 / (2 * s), 1 + std_dev_t**2 * (1 - s) / (2 * s)
    return x * (1 + drift_x * dt) + v * drift_v * dt, std_dev_t * (-dt).sqrt()


def dance_sde(v: Tensor, x: Tensor, s: Tensor, following: Tensor, eta: float) -> Gaussian:
    """An Euler step, corrected by the score of the predicted x0."""
    dt = following - s
    predicted_x0 = x - s * v
    score = -(x - (1 - s) * predicted_x0) / s**2
    return x + v * dt - eta**2 / 2 * score * dt, eta * (-dt).sqrt()


def cps(v: Tensor, x: Tensor, s: Tensor, following: Tensor, eta: float) -> Gaussian:
    """Predicted data and noise, recombined with a part of the noise drawn anew."""
    std = following * math.sin(eta * math.pi / 2)
    predicted_x0, predicted_noise = x - s * v, x + (1 - s) * v
    return (1 - following) * predicted_x0 + (following**2 - std**2).sqrt() * predicted_noise, std


def log_prob(x_next: Tensor, gaussian: Gaussian) -> Tensor:
    """With its constants, averaged over the elements."""
    mu, std = gaussian
    return mean(-((x_next - mu) ** 2) / (2 * std**2) - std.log() - math.log(math.sqrt(2 * math.pi)))


def log_prob_without_variance(x_next: Tensor, gaussian: Gaussian) -> Tensor:
    """IamCreateAI/FlowCPS, and all who took CPS from it."""
    return mean(-((x_next - gaussian[0]) ** 2))


def clipped(ratio: Tensor, A: Tensor, clip: float) -> Tensor:
    return torch.maximum(-A * ratio, -A * ratio.clamp(1 - clip, 1 + clip)).mean()


def kept(A: Tensor, log_ratio: Tensor, kl: Tensor, threshold: float) -> Tensor:
    """Flow-DPPO's mask, as all three code bases decide it."""
    ratio, large = log_ratio.exp(), kl >= threshold
    return ~(large & (((ratio > 1) & (A > 0)) | ((ratio < 1) & (A < 0))))


class Rollout:
    """A trainer's transitions, drawn from v_old by its own sampler; and rows that compare ours on them."""

    def __init__(
        self, trainer: str, inputs: Inputs, sampler: str, level: float, sigmas: Tensor, index: Tensor, **options: Any
    ) -> None:
        self.trainer, self.given, self.sampler, self.level, self.index = trainer, inputs, sampler, level, index
        self.at_one = sigmas[1]
        column = (-1, *[1] * len(SHAPE))
        self.s, self.following = sigmas[index].view(column), sigmas[index + 1].view(column)
        mu, std = self.step(inputs.v_old)
        self.x_next = mu + std * inputs.step_noise
        self.std, self.h = std.flatten(), (self.s - self.following).flatten()

        options = {"sampler": sampler, "noise_level": level, **options}
        self.table = af.StepTable(sigmas, **options)
        self.table_text = shown(af.StepTable, options).replace("...", "sigmas")
        self.drawn = af.sde_step(inputs.v_old, inputs.x, self.table, index, noise=inputs.step_noise)
        self.arguments = (inputs.v, inputs.v_old, self.drawn.eps, self.table, index, inputs.A)

    def step(self, v: Tensor) -> Gaussian:
        given = (v, self.given.x, self.s, self.following, self.level)
        if self.sampler == "flow_sde":
            return flow_sde(*given, self.at_one)
        return dance_sde(*given) if self.sampler == "dance_sde" else cps(*given)

    def log_ratio(self, v: Tensor, density: Callable[[Tensor, Gaussian], Tensor] = log_prob) -> Tensor:
        return density(self.x_next, self.step(v)) - density(self.x_next, self.step(self.given.v_old))

    def squared_drift(self, v: Tensor, anchor: Tensor) -> Tensor:
        """<(mean - mean of the anchor)^2>: what every KL is made of."""
        return mean((self.step(v)[0] - self.step(anchor)[0]) ** 2)

    def row(self, quantity: str, call: str, ours: Tensor, theirs: Tensor, departs: str = "") -> Row:
        return Row(self.trainer, quantity, call, (ours,), (theirs,), departs)

    def next_x(self) -> Row:
        call = f"sde_step(v, x, {self.table_text}, index).x_next"
        return self.row("next x", call, self.drawn.x_next, self.x_next)

    def log_prob(self) -> Row:
        call = f"sde_step(v, x, {self.table_text}, index).log_prob"
        return self.row(
            "log-probability", call, self.drawn.log_prob, log_prob(self.x_next, self.step(self.given.v_old))
        )

    def sigma_at_one(self, quantity: str, theirs: Tensor) -> Row:
        return self.row(quantity, f"{self.table_text}.sigma[0]", self.table.sigma[:1], theirs)

    def kl_of_a_change(self, step: int, schedule: str) -> Row:
        """How far two schedules are apart: the KL that a mean squared change of v of 1 costs at a step."""
        theirs = self.squared_drift(self.given.v + 1, self.given.v) / (2 * self.std**2)
        return self.row(
            f"KL of <dv^2> = 1 at step {step}, {schedule}", f"{self.table_text}.kappa[{step}] ** 2 / 2",
            self.table.kappa[step : step + 1] ** 2 / 2, theirs[self.index == step][:1],
        )  # fmt: skip

    def mean_log_ratio(self, op: Loss, theirs: Tensor, departs: str = "", quantity: str = "log-ratio") -> Row:
        ours = metric(op(*self.arguments), "mean_log_ratio")
        return self.row(quantity, f"{shown(op, {})}: mean_log_ratio", ours, theirs.mean(), departs)

    def clipped_count(self, op: Loss, log_ratio: Tensor, clip: float, quantity: str = "clipped transitions") -> Row:
        ratio, A = log_ratio.exp(), self.given.A
        theirs = (-A * ratio.clamp(1 - clip, 1 + clip) > -A * ratio).double().sum()
        ours = metric(op(*self.arguments, clip=clip), "masked_samples")
        return self.row(quantity, f"{shown(op, {'clip': clip})}: masked_samples", ours, theirs)

    def kl_old(self, theirs: Tensor, departs: str = "", quantity: str = "KL to the rollout policy") -> Row:
        ours = af.gaussian_kl_from_velocity(self.given.v, self.given.v_old, self.table, self.index)
        call = f"gaussian_kl_from_velocity(v, v_old, {self.table_text}, index)"
        return self.row(quantity, call, ours, theirs, departs)

    def kl_ref(self, op: Loss, theirs: Tensor, departs: str = "", **options: Any) -> Row:
        """Advantages of zero leave a loss its reference term."""
        options = {"v_ref": self.given.v_ref, "kl_weight": 1.0, **options}
        ours = op(*self.arguments[:-1], torch.zeros_like(self.given.A), **options).loss
        call = shown(op, options).replace("...", "..., 0 * A")
        return self.row("KL to the reference", call, ours, theirs.mean(), departs)

    def masked(self, theirs: Tensor, quantity: str = "masked transitions", **options: Any) -> Row:
        ours = af.flow_dppo_loss(*self.arguments, **options, reduction="none").loss == 0
        counts = (ours.sum().double(), ours.double()), (theirs.sum().double(), theirs.double())
        return Row(self.trainer, quantity, f"{shown(af.flow_dppo_loss, options)}: masked_samples", *counts)

    def loss(
        self, op: Loss, theirs: Callable[[Tensor], Tensor], departs: str = "", quantity: str = "loss", **options: Any
    ) -> Row:
        return loss_row(self.trainer, quantity, op, self.arguments, theirs, departs, **options)


def loss_row(
    trainer: str,
    quantity: str,
    op: Loss,
    arguments: tuple[Any, ...],
    theirs: Callable[[Tensor], Tensor],
    departs: str = "",
    **options: Any,
) -> Row:
    """Compares the gradient with respect to v, the first of ``arguments``, as well as the loss."""
    v, *others = arguments
    ours = with_gradient(lambda leaf: op(leaf, *others, **options).loss, v)
    return Row(trainer, quantity, shown(op, options), ours, with_gradient(theirs, v), departs)


def advantage_row(
    trainer: str, inputs: Inputs, theirs: Tensor, departs: str = "", quantity: str = "advantages", **options: Any
) -> Row:
    ours = af.group_advantages(inputs.rewards.flatten(), GROUP, **options)
    return Row(trainer, quantity, shown(af.group_advantages, options), (ours,), (theirs.flatten(),), departs)


# ---------------------------------------------------------------------------------------------------------------------
# Trainers of the reverse process


def flow_grpo(inputs: Inputs) -> Iterator[Row]:
    """train_sd3.py, train_sd3_fast.py (CPS), train_sd3_sft.py."""
    at = Rollout("flow_grpo", inputs, "flow_sde", 0.7, shifted_twice(10), STEPS % 9)
    std_dev_t = at.std / at.h.sqrt()

    def kl(v: Tensor) -> Tensor:
        return at.squared_drift(v, inputs.v_ref) / (2 * std_dev_t**2)

    def loss(v: Tensor) -> Tensor:
        return clipped(at.log_ratio(v).exp(), inputs.A, 1e-4) + 0.04 * kl(v).mean()

    yield at.kl_of_a_change(8, "shift 3 twice")
    yield at.sigma_at_one("sigma at s = 1", at.std[:1])
    yield at.next_x()
    yield at.log_prob()
    yield at.mean_log_ratio(af.flow_grpo_loss, at.log_ratio(inputs.v))
    yield at.clipped_count(af.flow_grpo_loss, at.log_ratio(inputs.v), 1e-4)
    yield at.kl_ref(
        af.flow_grpo_loss, kl(inputs.v), "it divides by 2 std_dev_t^2, without -dt; kl_convention='dt' gives it"
    )
    yield at.kl_ref(af.flow_grpo_loss, kl(inputs.v), kl_convention="dt")
    yield at.loss(af.flow_grpo_loss, loss, clip=1e-4, v_ref=inputs.v_ref, kl_weight=0.04, kl_convention="dt")

    fast = Rollout("flow_grpo", inputs, "cps", 0.8, shifted_twice(10), STEPS % 9)

    def fast_loss(v: Tensor) -> Tensor:
        kl = fast.squared_drift(v, inputs.v_ref) / (2 * fast.std**2)
        return clipped(fast.log_ratio(v, log_prob_without_variance).exp(), inputs.A, 1e-5) + 0.04 * kl.mean()

    yield fast.loss(
        af.flow_cps_loss, fast_loss, quantity="loss with its CPS sampler",
        clip=1e-5, v_ref=inputs.v_ref, kl_weight=0.04, kl_convention="exact",
    )  # fmt: skip

    over_all = inputs.centred / (inputs.rewards.std(correction=0) + 1e-4)
    over_group = inputs.centred / (inputs.rewards.std(1, correction=0, keepdim=True) + 1e-4)
    yield advantage_row(
        "flow_grpo", inputs, over_all.clamp(-5, 5), quantity="advantages, global_std on",
        norm="raw_global_std", clip=5.0,
    )  # fmt: skip
    yield advantage_row(
        "flow_grpo", inputs, over_group.clamp(-5, 5), quantity="advantages, global_std off",
        norm="group_std", clip=5.0,
    )  # fmt: skip

    scores = inputs.rewards.flatten()[:TRANSITIONS]
    best = scores.view(-1, 3) == scores.view(-1, 3).amax(1, keepdim=True)
    arguments = inputs.forward(scores)
    pull = {"v_ref": inputs.v_ref, "kl_weight": 100.0}  # its sft configurations' train.beta

    def weighted(v: Tensor, weights: Tensor) -> Tensor:
        return (weights * mean((v - inputs.u) ** 2) + 100 * mean((v - inputs.v_ref) ** 2)).mean()

    yield loss_row(
        "flow_grpo", "loss of type rwr", af.reward_weighted_loss, arguments, partial(weighted, weights=scores),
        method="linear", **pull,
    )  # fmt: skip
    yield loss_row(
        "flow_grpo", "loss of type sft", af.reward_weighted_loss, arguments, partial(weighted, weights=best.flatten()),
        method="best", group_size=3, **pull,
    )  # fmt: skip


def flow_cps(inputs: Inputs) -> Iterator[Row]:
    """train_sd3.py."""
    at = Rollout("FlowCPS", inputs, "cps", 0.8, shifted_twice(10), STEPS % 9)
    log_ratio = at.log_ratio(inputs.v, log_prob_without_variance)
    kl = at.squared_drift(inputs.v, inputs.v_ref)

    def loss(v: Tensor) -> Tensor:
        ratio = at.log_ratio(v, log_prob_without_variance).exp()
        return clipped(ratio, inputs.A, 1e-4) + 0.04 * at.squared_drift(v, inputs.v_ref).mean()

    yield at.kl_of_a_change(8, "shift 3 twice")
    yield at.next_x()
    yield at.mean_log_ratio(
        af.flow_grpo_loss, log_ratio, "its log-probabilities lack 1 / (2 sigma^2); flow_cps_loss gives it"
    )
    yield at.mean_log_ratio(af.flow_cps_loss, log_ratio)
    yield at.clipped_count(af.flow_cps_loss, log_ratio, 1e-4)
    yield at.kl_ref(
        af.flow_cps_loss, kl, "it lacks 1 / (2 sigma^2) as well; kl_convention='two_sigma_squared' gives it"
    )
    yield at.kl_ref(af.flow_cps_loss, kl, kl_convention="two_sigma_squared")
    yield at.loss(
        af.flow_cps_loss, loss, clip=1e-4, v_ref=inputs.v_ref, kl_weight=0.04, kl_convention="two_sigma_squared"
    )
    std = inputs.rewards.std(correction=0) + 1e-4
    yield advantage_row("FlowCPS", inputs, (inputs.centred / std).clamp(-5, 5), norm="raw_global_std", clip=5.0)


def dance_grpo(inputs: Inputs) -> Iterator[Row]:
    """train_grpo_flux.py."""
    at = Rollout("DanceGRPO", inputs, "dance_sde", 0.3, shifted_once(16), STEPS % 9)
    yield at.next_x()
    yield at.log_prob()
    yield at.mean_log_ratio(af.flow_grpo_loss, at.log_ratio(inputs.v))
    yield at.loss(af.flow_grpo_loss, lambda v: clipped(at.log_ratio(v).exp(), inputs.A, 1e-4), clip=1e-4)
    std = inputs.rewards.std(1, keepdim=True) + 1e-8
    yield advantage_row(
        "DanceGRPO", inputs, (inputs.centred / std).clamp(-5, 5), norm="group_std", clip=5.0, eps=1e-8, ddof=1
    )


def mix_grpo(inputs: Inputs) -> Iterator[Row]:
    """train_grpo_flux.py, sampling_utils.py."""
    window = (8, 9, 10, 11)
    inside = torch.tensor(window)[STEPS % len(window)]
    at = Rollout("MixGRPO", inputs, "flow_sde", 0.7, shifted_once(25), inside, stochastic_steps=window)
    yield at.next_x()
    yield at.log_prob()
    yield at.loss(af.flow_grpo_loss, lambda v: clipped(at.log_ratio(v).exp(), inputs.A, 1e-4), clip=1e-4)

    outside = af.sde_step(inputs.v_old, inputs.x, at.table, 5, noise=inputs.step_noise).x_next
    euler = inputs.x + inputs.v_old * (at.table.sigmas[6] - at.table.sigmas[5])
    yield at.row("next x outside the window", f"sde_step(v, x, {at.table_text}, index).x_next", outside, euler)

    dance = Rollout("MixGRPO", inputs, "dance_sde", 0.3, shifted_once(25), inside, stochastic_steps=window)
    unnormalised = mean(-((dance.x_next - dance.step(inputs.v_old)[0]) ** 2)) / (2 * dance.std**2)
    yield dance.row(
        "log-probability of its Dance step", f"sde_step(v, x, {dance.table_text}, index).log_prob",
        dance.drawn.log_prob, unnormalised, "its constants are a statement of their own and dropped; ratios are equal",
    )  # fmt: skip
    yield dance.mean_log_ratio(af.flow_grpo_loss, dance.log_ratio(inputs.v), quantity="log-ratio of its Dance step")
    std = inputs.rewards.std(1, keepdim=True) + 1e-8
    yield advantage_row(
        "MixGRPO", inputs, (inputs.centred / std).clamp(-5, 5), norm="group_std", clip=5.0, eps=1e-8, ddof=1
    )


def guard_ratio(at: Rollout, sigma: Tensor, v: Tensor, drift: Tensor | None = None) -> Tensor:
    """RatioNorm: the drift of the mean is added to the log-ratio, and the sum scaled by sigma."""
    drift = at.squared_drift(v, at.given.v_old) if drift is None else drift
    return ((at.log_ratio(v) + drift / (2 * sigma**2)) * sigma).exp()


def guard_of_means(at: Rollout, mean_drift: bool, v: Tensor) -> Tensor:
    """sigma and dt are means over the batch (flow_grpo and verl-omni), and the drift is too (flow_grpo, whose ``mean``
    over no dimension is one over all)."""
    sqrt_dt = at.h.sqrt().mean()
    sigma = (at.std / at.h.sqrt()).mean() * sqrt_dt
    drift = at.squared_drift(v, at.given.v_old).mean() if mean_drift else None
    return clipped(guard_ratio(at, sigma, v, drift), at.given.A, GUARD_CLIP) / sqrt_dt**2


def guard_of_each(at: Rollout, sigma: Tensor, v: Tensor) -> Tensor:
    return clipped(guard_ratio(at, sigma, v), at.given.A, GUARD_CLIP)


def grpo_guard(inputs: Inputs) -> Iterator[Row]:
    """flow_grpo's train_sd3_GRPO_Guard.py and Flow-Factory's trainers/rl/grpo.py, before that trainers/grpo.py."""
    name, sigmas, op = "GRPO-Guard (flow_grpo)", shifted_twice(10), af.grpo_guard_loss
    same, mixed = torch.full_like(STEPS, 3), STEPS % 9
    at = Rollout(name, inputs, "flow_sde", 0.7, sigmas, same)
    log_ratio = guard_ratio(at, at.std, inputs.v).log()
    yield at.mean_log_ratio(op, log_ratio)
    yield at.clipped_count(op, log_ratio, GUARD_CLIP, "clipped transitions, batches of one")
    yield at.loss(
        op,
        lambda v: guard_of_each(at, at.std, v) / at.h[0],
        quantity="loss of one step, batches of one",
        clip=GUARD_CLIP,
    )
    yield at.loss(
        op, partial(guard_of_means, at, True),
        "its drift is the mean over the batch as well; equal in a batch of one",
        quantity="loss of one step", clip=GUARD_CLIP,
    )  # fmt: skip
    both = Rollout(name, inputs, "flow_sde", 0.7, sigmas, mixed)
    yield both.loss(
        op, partial(guard_of_means, both, True),
        "its drift, sigma and dt are means over the batch; equal in a batch of one",
        quantity="loss of mixed steps", clip=GUARD_CLIP,
    )  # fmt: skip
    kl = at.squared_drift(inputs.v, inputs.v_ref) * at.h / (2 * at.std**2)
    yield at.kl_ref(op, kl, "it divides by 2 std_dev_t^2, without -dt; in a batch of one step kl_weight times -dt")

    options: dict[str, Any] = {"clip": GUARD_CLIP, "time_weight": "none"}
    name, sigmas = "GRPO-Guard (Flow-Factory)", shifted_once(10)
    now = Rollout(name, inputs, "flow_sde", 0.7, sigmas, mixed)
    yield now.loss(op, partial(guard_of_each, now, now.std), quantity="loss of mixed steps", **options)
    # Earlier a sigma of [B, 1, 1, 1] met log-ratios of [B]: every sample's with every step's, [B, 1, 1, B].
    for steps, quantity, departs in (
        (same, "loss of one step", ""),
        (mixed, "loss of mixed steps", "it scales every sample's log-ratio by every sample's sigma"),
    ):
        at = Rollout(f"{name}, earlier", inputs, "flow_sde", 0.7, sigmas, steps)
        crossed = partial(guard_of_each, at, at.std.view_as(at.s))
        yield at.loss(op, crossed, departs, quantity=quantity, **options)


def flow_factory(inputs: Inputs) -> Iterator[Row]:
    """trainers/grpo.py with kl_type x-based, advantage/advantage_processor.py, scheduler/."""
    at = Rollout("Flow-Factory", inputs, "flow_sde", 0.7, shifted_once(10), STEPS % 9)

    def loss(v: Tensor) -> Tensor:
        return clipped(at.log_ratio(v).exp(), inputs.A, 1e-4) + 0.01 * at.squared_drift(v, inputs.v_ref).mean()

    yield at.kl_of_a_change(8, "shift 3 once")
    yield at.loss(
        af.flow_grpo_loss, loss, clip=1e-4, v_ref=inputs.v_ref, kl_weight=0.01, kl_convention="two_sigma_squared"
    )
    std = max(float(inputs.rewards.std(correction=0)), 1e-6)
    yield advantage_row(
        "Flow-Factory", inputs, (inputs.centred / std).clamp(-5, 5), norm="raw_global_std", clip=5.0, eps=0.0
    )


def unirl_flow_dppo(inputs: Inputs) -> Iterator[Row]:
    """algorithms/flowdppo.py and base.py, sde/kernels.py: the sampler's own sigma in its KLs."""
    name, sigmas, A = "UniRL Flow-DPPO", shifted_once(10), inputs.A
    at = Rollout(name, inputs, "flow_sde", 0.7, sigmas, STEPS % 9)

    def kl(at: Rollout, v: Tensor, anchor: Tensor) -> Tensor:
        return at.squared_drift(v, anchor) / (2 * at.std**2)

    def loss(v: Tensor, density: Callable[[Tensor, Gaussian], Tensor] = log_prob, at: Rollout = at) -> Tensor:
        log_ratio = at.log_ratio(v, density)
        keep = kept(A, log_ratio, kl(at, v, inputs.v_old), 1e-6)
        return (torch.where(keep, -A * log_ratio.exp(), 0) + 0.01 * kl(at, v, inputs.v_ref)).mean()

    options: dict[str, Any] = {"threshold": 1e-6, "v_ref": inputs.v_ref, "kl_weight": 0.01}
    yield at.sigma_at_one("sigma at s = 1, sampler and KL", at.std[:1])
    yield at.kl_old(kl(at, inputs.v, inputs.v_old))
    yield at.masked(~kept(A, at.log_ratio(inputs.v), kl(at, inputs.v, inputs.v_old), 1e-6), threshold=1e-6)
    yield at.kl_ref(af.flow_dppo_loss, kl(at, inputs.v, inputs.v_ref))
    yield at.loss(af.flow_dppo_loss, loss, **options)
    other = Rollout(name, inputs, "cps", 0.8, sigmas, STEPS % 9)
    yield other.kl_old(kl(other, inputs.v, inputs.v_old), quantity="KL to the rollout policy, CPS")
    yield other.loss(
        af.flow_dppo_loss, partial(loss, density=log_prob_without_variance, at=other),
        "its log-probabilities of CPS lack 1 / (2 sigma^2)", quantity="loss, CPS", **options,
    )  # fmt: skip


def earlier_unirl_flow_dppo(inputs: Inputs) -> Iterator[Row]:
    """algorithms/flowdppo.py, sde/, types/rollout_resp.py of June 2026."""
    name, sigmas = "UniRL Flow-DPPO, earlier", shifted_once(10)
    at = Rollout(name, inputs, "flow_sde", 0.7, sigmas, STEPS % 9)
    kl_table = Rollout(name, inputs, "flow_sde", 0.7, sigmas, STEPS % 9, convention="clamp_0.99")

    def kl(at: Rollout, v: Tensor) -> Tensor:
        """With a sigma rebuilt from the schedule, whatever the sampler took."""
        std_dev_t = 0.7 * (at.s / (1 - at.s.clamp(max=0.99))).sqrt()
        sigma = std_dev_t.flatten() * at.h.sqrt()
        return at.squared_drift(v, inputs.v_old) / (2 * sigma**2)

    def loss(at: Rollout, threshold: float) -> Callable[[Tensor], Tensor]:
        def of(v: Tensor) -> Tensor:
            log_ratio = at.log_ratio(v)
            keep = kept(inputs.A, log_ratio, kl(at, v), threshold)
            return torch.where(keep, -inputs.A * log_ratio.exp(), 0).mean()

        return of

    yield at.kl_of_a_change(8, "shift 3 once")
    yield at.next_x()
    yield at.log_prob()
    yield at.sigma_at_one("sigma at s = 1, sampler", at.std[:1])
    yield kl_table.sigma_at_one("sigma at s = 1, KL", 0.7 * (torch.tensor(1 / 0.01).double() * at.h[:1]).sqrt())
    yield at.kl_old(
        kl(at, inputs.v), "its KL clamps s at 0.99, its sampler does not; convention='clamp_0.99' gives the KL"
    )
    yield kl_table.kl_old(kl(at, inputs.v))

    later = Rollout(name, inputs, "flow_sde", 0.7, sigmas, 1 + STEPS % 4)
    keep = kept(inputs.A, later.log_ratio(inputs.v), kl(later, inputs.v), 1e-6)
    yield later.masked(~keep, threshold=1e-6)
    yield later.loss(af.flow_dppo_loss, loss(later, 1e-6), quantity="loss, s below 1", threshold=1e-6)
    first = Rollout(name, inputs, "flow_sde", 0.7, sigmas, 0 * STEPS)
    yield first.loss(  # threshold times (1 - sigmas[1]) / (1 - 0.99)
        af.flow_dppo_loss, loss(first, 1e-7), quantity="loss at s = 1 for its threshold=1e-07", threshold=3.5714e-7
    )
    other = Rollout(name, inputs, "cps", 0.8, sigmas, STEPS % 9)
    yield other.kl_of_a_change(8, "shift 3 once, CPS")
    yield other.kl_old(
        kl(other, inputs.v), "its KL takes Flow-SDE's sigma under every sampler; no option gives it",
        quantity="KL to the rollout policy, CPS",
    )  # fmt: skip

    over_all = inputs.centred / (inputs.rewards.std() + 1e-8)
    yield advantage_row(
        name, inputs, over_all, quantity="advantages, use_global_std on",
        norm="raw_global_std", clip=None, eps=1e-8, ddof=1,
    )  # fmt: skip
    over_group = inputs.centred / (inputs.rewards.var(1, correction=0, keepdim=True) + 1e-8).sqrt()
    yield advantage_row(
        name, inputs, over_group, "its eps is inside the root; eps=0.0 is within 1e-8 / (2 variance) of it",
        quantity="advantages, use_global_std off", norm="group_std", clip=None, eps=0.0,
    )  # fmt: skip


def flow_dppo_paper(inputs: Inputs) -> Iterator[Row]:
    """arXiv 2606.11025, and the refinements of its appendix E."""
    at = Rollout("Flow-DPPO paper", inputs, "flow_sde", 0.8, shifted_once(10), STEPS % 9)
    sigma, A = at.std, inputs.A
    mu, mu_old = at.step(inputs.v)[0], at.step(inputs.v_old)[0]
    log_ratio, kl = at.log_ratio(inputs.v), at.squared_drift(inputs.v, inputs.v_old) / (2 * sigma**2)

    def loss(v: Tensor) -> Tensor:
        keep = kept(A, at.log_ratio(v), at.squared_drift(v, inputs.v_old) / (2 * sigma**2), 1e-6)
        kl_ref = at.squared_drift(v, inputs.v_ref) / (2 * sigma**2)
        return (torch.where(keep, -A * at.log_ratio(v).exp(), 0) + 1e-3 * kl_ref).mean()

    yield at.kl_old(kl, quantity="KL to the rollout policy, eq. 15")
    yield at.row("KL of two means, eq. 20", "gaussian_kl(mean, mean_old, sigma)", af.gaussian_kl(mu, mu_old, sigma), kl)
    yield at.masked(~kept(A, log_ratio, kl, 1e-6), threshold=1e-6)
    yield at.loss(af.flow_dppo_loss, loss, threshold=1e-6, v_ref=inputs.v_ref, kl_weight=1e-3)

    away = (A * (log_ratio - kl) > 0) & (kl >= 1e-6)
    yield at.masked(
        away, quantity="masked transitions, App. E direction", threshold=1e-6, direction="log_ratio_minus_kl"
    )
    size = 2e-3
    stepped = mu + (size * A * log_ratio.exp() / sigma**2).view_as(at.s) * (at.x_next - mu)
    kl_after = mean((stepped - mu_old) ** 2) / (2 * sigma**2)
    yield at.masked(
        ~kept(A, log_ratio, kl_after, 1e-6), quantity="masked transitions, App. E prediction",
        threshold=1e-6, mask="predictive", step_size=size,
    )  # fmt: skip


def verl_omni(inputs: Inputs) -> Iterator[Row]:
    """trainer/diffusion/diffusion_algos.py, pipelines/schedulers."""
    name, A = "verl-omni", inputs.A
    sigmas = shifted_twice(10)
    at = Rollout(name, inputs, "flow_sde", 0.7, sigmas, STEPS % 9)

    def loss(v: Tensor) -> Tensor:
        kl = at.squared_drift(v, inputs.v_ref) * at.h / (2 * at.std**2)  # its std_dev_t lacks sqrt(-dt)
        return clipped(at.log_ratio(v).exp(), A, 1e-4) + 0.04 * kl.mean()

    def dppo_loss(v: Tensor) -> Tensor:
        log_ratio = at.log_ratio(v)
        keep = kept(A, log_ratio, at.squared_drift(v, inputs.v_old) / (2 * at.std**2), 1e-5)
        return torch.where(keep, -A * log_ratio.exp(), 0).mean()

    yield at.log_prob()
    yield at.loss(
        af.flow_grpo_loss, loss, quantity="flow_grpo loss",
        clip=1e-4, v_ref=inputs.v_ref, kl_weight=0.04, kl_convention="dt",
    )  # fmt: skip
    yield at.loss(af.flow_dppo_loss, dppo_loss, quantity="flow_dppo loss", threshold=1e-5)
    for sampler, level in (("cps", 0.8), ("dance_sde", 0.3)):
        other = Rollout(name, inputs, sampler, level, sigmas, STEPS % 9)
        yield other.kl_old(
            other.squared_drift(inputs.v, inputs.v_old) / (2 * other.std**2 * other.h),
            "it multiplies a whole sigma by sqrt(-dt) again; in a batch of one step threshold times -dt",
            quantity=f"KL to the rollout policy, {sampler}",
        )  # fmt: skip
    guard = Rollout(name, inputs, "flow_sde", 0.7, sigmas, torch.full_like(STEPS, 3))
    yield guard.loss(
        af.grpo_guard_loss, partial(guard_of_means, guard, False),
        quantity="grpo_guard loss of one step", clip=GUARD_CLIP,
    )  # fmt: skip
    yield at.loss(
        af.grpo_guard_loss, partial(guard_of_means, at, False),
        "its sigma and dt are means over the batch; equal where a batch is of one step",
        quantity="grpo_guard loss of mixed steps", clip=GUARD_CLIP,
    )  # fmt: skip
    yield loss_row(
        name, "diffusion_nft loss", af.diffusion_nft_loss, inputs.forward(A),
        partial(nft, inputs, r=(A.clamp(-5, 5) / 5 + 1) / 2, beta=1.0),
        v_old=inputs.v_old, v_ref=inputs.v_ref, beta=1.0, adv_clip_max=5.0, kl_weight=1e-4,
    )  # fmt: skip
    yield advantage_row(
        name, inputs, (inputs.centred / (inputs.rewards.std() + 1e-4)).clamp(-5, 5),
        norm="raw_global_std", clip=5.0, ddof=1,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Trainers of the forward process


def nft(inputs: Inputs, v: Tensor, r: Tensor, beta: float) -> Tensor:
    """Two branches of x0-predictions, each divided by its own mean absolute error; adv_clip_max 5, train.beta 1e-4."""

    def branch(mixed: Tensor) -> Tensor:
        x0 = inputs.x_t - inputs.column_t * mixed
        weight = mean((x0.detach() - inputs.x0).abs()).clamp(min=1e-5)
        return mean((x0 - inputs.x0) ** 2) / weight

    positive = branch(beta * v + (1 - beta) * inputs.v_old)
    negative = branch((1 + beta) * inputs.v_old - beta * v)
    policy = (r * positive / beta + (1 - r) * negative / beta) * 5
    return policy.mean() + 1e-4 * mean((v - inputs.v_ref) ** 2).mean()


def diffusion_nft(inputs: Inputs) -> Iterator[Row]:
    """NVlabs' train_nft_sd3.py, UniRL's algorithms/diffusionnft.py (ref_deviation_coef 1e-4), and the paper's loss."""
    name, A = "DiffusionNFT", 2 * inputs.A
    arguments = inputs.forward(A)
    bounded = A.clamp(-5, 5)
    adv_modes = {
        "all": bounded,
        "positive": bounded.clamp(min=0),
        "negative": bounded.clamp(max=0),
        "one": (bounded > 0).double(),
        "binary": bounded.sign(),
    }
    for beta in (1.0, 0.1):
        for mode, advantages in adv_modes.items() if beta == 1 else [("all", bounded)]:
            r = (advantages / 5 / 2 + 0.5).clamp(0, 1)
            yield loss_row(
                name, f"loss, beta {beta:g}, adv_mode {mode}", af.diffusion_nft_loss, arguments,
                partial(nft, inputs, r=r, beta=beta),
                v_old=inputs.v_old, v_ref=inputs.v_ref, beta=beta, adv_clip_max=5.0, kl_weight=1e-4, mode=mode,
            )  # fmt: skip

    std = inputs.rewards.std(correction=0) + 1e-4
    yield advantage_row(name, inputs, inputs.centred / std, norm="raw_global_std", clip=None)
    yield loss_row(
        "UniRL DiffusionNFT", "loss", af.diffusion_nft_loss, arguments,
        partial(nft, inputs, r=bounded / 10 + 0.5, beta=1.0),
        v_old=inputs.v_old, v_ref=inputs.v_ref, beta=1.0, adv_clip_max=5.0, kl_weight=1e-4,
    )  # fmt: skip

    A = inputs.A.clamp(-1, 1)
    r, beta = (1 + A) / 2, 0.5

    def paper(v: Tensor) -> Tensor:
        positive, negative = inputs.v_old + beta * (v - inputs.v_old), inputs.v_old - beta * (v - inputs.v_old)
        return (r * mean((positive - inputs.u) ** 2) + (1 - r) * mean((negative - inputs.u) ** 2)).mean()

    options: dict[str, Any] = {"gamma": "beta(beta-A)", "beta": beta, "lam": 0.0, "weighting": "velocity"}
    given = (inputs.x0, inputs.noise, inputs.t, A)
    ours = with_gradient(lambda v: af.advantage_flow_loss(v, *given, v_old=inputs.v_old, **options).loss, inputs.v)
    theirs = with_gradient(paper, inputs.v)
    call = shown(af.advantage_flow_loss, {"v_old": inputs.v_old, **options})
    yield Row("DiffusionNFT paper", "gradient of the loss", call, ours[1:], theirs[1:])


def awm(inputs: Inputs) -> Iterator[Row]:
    """train_sd3_awm.py."""
    name, A, t = "AWM", inputs.A, inputs.t

    def lp(v: Tensor, weighting: str) -> Tensor:
        error = mean((v - inputs.u) ** 2)
        if weighting == "huber":
            return -t * ((error + 1e-10).sqrt() - 1e-5)
        if weighting == "ghuber":
            return -t * ((error + 1e-10).pow(0.25) - math.pow(1e-10, 0.25)) / 0.25
        weight = {"uniform": torch.ones_like(t), "t": t, "t2": t.square()}[weighting]
        return -error * weight

    def loss(v: Tensor, weighting: str, lp_old: Tensor | None = None, clip: float = 1.0) -> Tensor:
        denominator = lp(v, weighting).detach() if lp_old is None else lp_old
        policy = clipped((lp(v, weighting) - denominator).exp(), A, clip)
        return policy + 3e-3 * mean((v - inputs.v_ref) ** 2).mean() + mean((v - inputs.v_ema) ** 2).mean()

    anchors = {"v_ema": inputs.v_ema, "v_ref": inputs.v_ref, "kl_weight": 3e-3}
    for weighting in ("uniform", "t", "t2", "huber", "ghuber"):
        ours = af.awm_log_prob(*inputs.forward(A)[:4], weighting=weighting)
        call = shown(af.awm_log_prob, {"weighting": weighting})
        yield Row(name, f"log-probability, {weighting}", call, (ours,), (lp(inputs.v, weighting),))
        yield loss_row(
            name, f"on-policy loss, {weighting}", af.awm_loss, inputs.forward(A), partial(loss, weighting=weighting),
            weighting=weighting, clip=1.0, **anchors,
        )  # fmt: skip
    lp_old = lp(inputs.v_old, "ghuber")
    yield loss_row(
        name, "off-policy loss, exp_first", af.awm_loss, inputs.forward(A),
        partial(loss, weighting="ghuber", lp_old=lp_old, clip=1e-4),
        log_prob_old=lp_old, weighting="ghuber", clip=1e-4, **anchors,
    )  # fmt: skip
    std = inputs.rewards.std(correction=0) + 1e-4
    yield advantage_row(
        name, inputs, (inputs.centred / std).clamp(-5, 5) / 5, norm="raw_global_std", clip=5.0, clip_mode="clip_divide"
    )


def flow_awr(inputs: Inputs) -> Iterator[Row]:
    """train_awr_sd3.py with energy_mode, stat_tracking.py (hard_gating for rewards by rule); and the paper's form."""
    energies = (2 * inputs.A).clamp(-3, 3)
    E, arguments = energies.view(-1, *[1] * len(SHAPE)), inputs.forward(energies)

    def loss(v: Tensor) -> Tensor:
        x0, x0_old = inputs.x_t - inputs.column_t * v, inputs.x_t - inputs.column_t * inputs.v_old
        target = x0_old + E * (inputs.x0 - x0_old)
        weight = mean((x0.detach() - inputs.x0).abs()).clamp(min=1e-5)
        return (mean((x0 - target) ** 2) / weight).mean() + 1e-4 * mean((v - inputs.v_ref) ** 2).mean()

    anchors = {"v_old": inputs.v_old, "v_ref": inputs.v_ref, "kl_weight": 1e-4}
    yield loss_row("FlowAWR", "loss", af.flow_awr_loss, arguments, loss, **anchors)

    def advantages(trainer: str, quantity: str, theirs: Tensor, **options: Any) -> Row:
        ours = af.softmax_advantages(inputs.rewards.flatten(), GROUP, **options)
        return Row(trainer, quantity, shown(af.softmax_advantages, options), (ours,), (theirs.flatten(),))

    std = inputs.rewards.std(correction=0)
    excess = torch.softmax((inputs.centred / (std + 1e-4)).clamp(-5, 5), 1) - 1 / GROUP
    gate = (excess.std(1, correction=0, keepdim=True) + 1e-4).clamp(min=1e-2)
    yield advantages("FlowAWR", "advantages", (GROUP * excess).clamp(-3, 3))
    yield advantages("FlowAWR", "advantages, hard_gating on", (excess / gate).clamp(-3, 3), scale_by_std=True)

    def paper(v: Tensor) -> Tensor:
        target = inputs.v_old + E * (inputs.u - inputs.v_old)
        return (mean((v - target) ** 2) + 1e-4 * mean((v - inputs.v_ref) ** 2)).mean()

    yield loss_row("FlowAWR paper", "loss", af.flow_awr_loss, arguments, paper, **anchors, weighting="velocity")
    yield advantages(
        "FlowAWR paper", "advantages, eq. 11", GROUP * torch.softmax(inputs.rewards / std, 1) - 1,
        clip_rewards=None, clip=None, eps=0.0,
    )  # fmt: skip


def orw_cfm(inputs: Inputs) -> Iterator[Row]:
    """finetune_fm.py, whose time runs from noise to data: its velocities are minus ours."""

    def loss(v: Tensor) -> Tensor:
        data, noise = inputs.x0, inputs.noise
        matching = mean((-v - (data - noise)) ** 2)
        return ((0.5 * inputs.A).exp() * matching + 1.0 * mean((-v + inputs.v_ref) ** 2)).mean()

    yield loss_row(
        "ORW-CFM", "loss", af.reward_weighted_loss, inputs.forward(inputs.A), loss,
        method="exp", tau=0.5, v_ref=inputs.v_ref, kl_weight=1.0,
    )  # fmt: skip


def advantage_flow(inputs: Inputs) -> Iterator[Row]:
    """AdvantageFlow's eq. 5 and 6, and the shared scale of MeanFlowAdvantage (eq. 12)."""
    A = inputs.A.clamp(-1, 1)
    arguments = inputs.forward(A)
    x_t, t = inputs.x_t, inputs.column_t

    def terms(v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Squared norms of predictions, which the paper sums, over the number of elements."""
        x0 = x_t - t * v
        anchors = (inputs.x0, x_t - t * inputs.v_old, x_t - t * inputs.v_ref)
        data, old, ref = ((x0 - anchor).flatten(1).square().sum(1) / math.prod(SHAPE) for anchor in anchors)
        return data, old, ref

    def quadratic(v: Tensor, data_weight: Tensor, rollout_weight: Tensor) -> Tensor:
        data, old, ref = terms(v)
        return (data_weight * data + rollout_weight * old + 1e-3 * ref).mean()

    for beta, gamma, weight in (
        (1.0, 1.1, torch.full_like(A, 1.1)),
        (1.0, "1-A", 1 - A),
        (0.1, "beta(beta-A)", 0.01 - 0.1 * A),
    ):
        yield loss_row(
            "AdvantageFlow", f"loss / D, rollout weight {gamma}", af.advantage_flow_loss, arguments,
            partial(quadratic, data_weight=beta * A, rollout_weight=weight),
            v_old=inputs.v_old, v_ref=inputs.v_ref, gamma=gamma, lam=1e-3, beta=beta,
        )  # fmt: skip
    rms = inputs.centred.square().mean().sqrt()
    yield advantage_row("AdvantageFlow", inputs, (inputs.centred / rms).clamp(-1, 1), norm="batch_rms", clip=1.0)

    def shared_scale(v: Tensor) -> Tensor:
        data, old, ref = terms(v)
        w = mean((x_t - t * v - inputs.x0).detach().abs()).clamp(min=1e-5)
        return ((A * data + 1.1 * old + 1e-3 * ref) / w).mean()

    yield loss_row(
        "MeanFlowAdvantage", "loss at s = t", af.advantage_flow_loss, arguments, shared_scale,
        v_old=inputs.v_old, v_ref=inputs.v_ref, gamma=1.1, lam=1e-3, weighting="adaptive",
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------


TRAINERS = (
    flow_grpo, flow_cps, dance_grpo, mix_grpo, grpo_guard, flow_factory, unirl_flow_dppo,
    earlier_unirl_flow_dppo, flow_dppo_paper, verl_omni,
    diffusion_nft, awm, flow_awr, orw_cfm, advantage_flow,
)  # fmt: skip


def rows(seed: int = 0) -> list[Row]:
    inputs = Inputs(seed)
    return [row for trainer in TRAINERS for row in trainer(inputs)]


def table(compared: list[Row]) -> str:
    lines = []
    for trainer, its_rows in groupby(compared, key=lambda row: row.trainer):
        lines.append(f"{trainer:<52} {'ours':>14} {'theirs':>14} {'digits':>6}  agrees")
        lines.append(f"  {SOURCES.get(trainer, '')}")
        for row in its_rows:
            verdict = "yes" if row.agrees else f"no: {row.departs}" if row.departs else "NO"
            ours, theirs = (float(values[0].flatten()[0]) for values in (row.ours, row.theirs))
            lines.append(f"  {row.quantity:<50} {ours:>14.8g} {theirs:>14.8g} {row.digits:>6.1f}  {verdict}")
            lines.append(f"      {row.call}")
        lines.append("")
    return "\n".join(lines)


LEGEND = """\
'...' stands for v, x0, noise, t, A or v, v_old, eps, table, index, A, and for rewards, group_size. Shown is the first
value of a row; the digits are those of its worst element. A loss row also compares the gradient with respect to v."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m advflow_ext.conformance", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table there too")
    options = parser.parse_args(argv)
    compared = rows()
    wrong = [row for row in compared if not row.agrees and not row.departs]
    print(table(compared))
    print(LEGEND)
    print(
        f"{sum(row.agrees for row in compared)} of {len(compared)} rows agree to {AGREEING_DIGITS:g} digits or more, "
        f"{sum(bool(row.departs) for row in compared)} show where a trainer departs, {len(wrong)} are wrong."
    )
    if options.json is not None:
        versions = {"advflow_ext": af.__version__, "torch": torch.__version__}
        document = {"versions": versions, "rows": [row.to_json() for row in compared]}
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
