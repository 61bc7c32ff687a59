"""Schedules, samplers, densities and ratios as trainers of the reverse process write them, and rows made of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import advflow_ext as af
from advflow_ext.conformance.rows import (
    SHAPE,
    Inputs,
    Loss,
    Row,
    loss_row,
    mean,
    metric,
    shown,
    widened,
)

Gaussian = tuple[Tensor, Tensor]  # mean of the next x, and its standard deviation [N, 1, 1, 1]
# A trainer's step on its transitions, as a function of the velocity; of flow_grpo with its parts.
Step = Callable[[Tensor], Gaussian]
StepInParts = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
Density = Callable[[Tensor, Gaussian], Tensor]


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


def flow_sde_in_parts(
    v: Tensor, x: Tensor, s: Tensor, following: Tensor, a: float, at_one: Tensor | float
) -> tuple[Tensor, Tensor, Tensor]:
    """As flow_grpo returns it: the mean, ``std_dev_t``, and the sqrt(-dt) that its noise has besides."""
    v, x = widened(v), widened(x)
    dt = following - s
    std_dev_t = a * (s / (1 - torch.where(s == 1, at_one, s))).sqrt()
    drift_x, drift_v = std_dev_t**2 / (2 * s), 1 + std_dev_t**2 * (1 - s) / (2 * s)
    return x * (1 + drift_x * dt) + v * drift_v * dt, std_dev_t, (-dt).sqrt()


def flow_sde(v: Tensor, x: Tensor, s: Tensor, following: Tensor, a: float, at_one: Tensor | float) -> Gaussian:
    mu, std_dev_t, sqrt_dt = flow_sde_in_parts(v, x, s, following, a, at_one)
    return mu, std_dev_t * sqrt_dt


def dance_sde(v: Tensor, x: Tensor, s: Tensor, following: Tensor, eta: float) -> Gaussian:
    """An Euler step, corrected by the score of the predicted x0."""
    dt = following - s
    predicted_x0 = x - s * v
    score = -(x - (1 - s) * predicted_x0) / s**2
    return x + v * dt - eta**2 / 2 * score * dt, eta * (-dt).sqrt()


def cps(v: Tensor, x: Tensor, s: Tensor, following: Tensor, eta: float) -> Gaussian:
    """Predicted data and noise, recombined with a part of the noise drawn anew."""
    v, x = widened(v), widened(x)
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
        self.mean_old, std = self.step(inputs.v_old)
        self.x_next = self.mean_old + std * inputs.step_noise
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

    def step_in_parts(self, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return flow_sde_in_parts(v, self.given.x, self.s, self.following, self.level, self.at_one)

    def log_prob_old(self, density: Density = log_prob) -> Tensor:
        return density(self.x_next, self.step(self.given.v_old))

    def log_ratio(self, v: Tensor, density: Density = log_prob) -> Tensor:
        return density(self.x_next, self.step(v)) - self.log_prob_old(density)

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

    def stored_log_prob(self, variance: bool = True, quantity: str = "log-probability of a stored transition") -> Row:
        """With its gradient, which those who call it with the policy's v take."""
        density = log_prob if variance else log_prob_without_variance
        leaf = self.given.v.clone().requires_grad_()

        def with_its_gradient(values: Tensor) -> tuple[Tensor, Tensor]:
            (grad,) = torch.autograd.grad((self.given.A * values).sum(), leaf)
            return values.detach(), grad

        ours = af.transition_log_prob(leaf, self.given.x, self.x_next, self.table, self.index, variance=variance)
        theirs = density(self.x_next, self.step(leaf))
        call = f"transition_log_prob(v, x, x_next, {self.table_text}, index{'' if variance else ', variance=False'})"
        return Row(self.trainer, quantity, call, with_its_gradient(ours), with_its_gradient(theirs))

    def stored_noise(self) -> Row:
        ours = af.transition_noise(self.given.v_old, self.given.x, self.x_next, self.table, self.index)
        call = f"transition_noise(v_old, x, x_next, {self.table_text}, index)"
        std = self.std.view(-1, *[1] * len(SHAPE))
        return self.row("noise of a stored transition", call, ours, (self.x_next - self.mean_old) / std)

    def stored_means(self) -> Row:
        """Its means are linear in v, and say which v it was."""
        ours = af.from_means(self.mean_old, self.given.x, self.x_next, self.table, self.index)
        call = f"from_means(means, x, x_next, {self.table_text}, index)"
        std = self.std.view(-1, *[1] * len(SHAPE))
        theirs = self.given.v_old, (self.x_next - self.mean_old) / std
        return Row(self.trainer, "rollout's velocity and noise, of its means", call, ours, theirs)

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
