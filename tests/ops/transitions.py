"""One deterministic batch of sampler steps, the four losses on it, and their common closed form, for the tests here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import advflow_ext as af
from advflow_ext.testing.transition_strategies import TABLES, TransitionBatch

LOSSES = ("flow_grpo", "grpo_guard", "flow_cps", "flow_dppo")


def native(name: str) -> Callable[..., af.LossOutput]:
    return getattr(af, f"{name}_loss")


def reference(name: str) -> Callable[..., af.LossOutput]:
    return getattr(af.reference, f"{name}_loss")


BOTH = {"native": native, "reference": reference}
SPACES = {"native": af, "reference": af.reference}


def draw_transitions(
    batch: int = 4,
    shape: tuple[int, ...] = (3, 5, 7),
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
    drift: float = 0.1,
    table: af.StepTable = TABLES[0],
    with_reference: bool = True,
    **options: Any,
) -> TransitionBatch:
    generator = torch.Generator().manual_seed(seed)
    v_old, change, eps, v_ref = torch.randn(4, batch, *shape, generator=generator).unbind()
    v = (v_old + drift * change).to(device, dtype)
    steps = torch.tensor(table.stochastic_steps)
    index = steps[torch.arange(batch) % len(steps)].to(device)
    advantages = 2 * torch.rand(batch, generator=generator) - 1
    if with_reference:
        options = {"v_ref": v_ref.to(device, dtype), "kl_weight": 0.04, **options}
    v_old, eps = v_old.to(device, dtype), eps.to(device, dtype)
    return TransitionBatch(v.requires_grad_(), v_old, eps, table, index, advantages.to(device), options)


def value_and_grad(batch: TransitionBatch, loss: Callable[..., af.LossOutput]) -> tuple[af.LossOutput, Tensor]:
    out = loss(*batch.arguments(), **batch.options)
    (grad,) = torch.autograd.grad(out.loss.sum(), batch.v)
    return out, grad


def truth(name: str, batch: TransitionBatch) -> tuple[af.LossOutput, Tensor]:
    """The float64 reference of the same rounded inputs."""
    return value_and_grad(batch.to(torch.float64), reference(name))


def select(batch: TransitionBatch, rows: Any) -> TransitionBatch:
    """The same transitions, some of them, in another order."""
    return batch.map(lambda tensor: tensor[rows].clone())


@dataclass
class ClosedForm:
    """Float64 log-ratio, KL and the sizes of what was added up for them and for the gradient."""

    log_ratio: Tensor
    kl: Tensor
    reach: Tensor  # the KL after one predicted step
    error: Tensor  # what float32 may get wrong in the log-ratio, times 1e6
    loss: Tensor  # size of the loss
    grad: Tensor  # size of the gradient of the summed loss


def closed_form(name: str, batch: TransitionBatch) -> ClosedForm:
    wide = batch.to(torch.float64)
    step = batch.table.rows(batch.index, torch.float64)
    v, v_old, eps = (tensor.detach().flatten(1) for tensor in (wide.v, wide.v_old, wide.eps))
    delta, A = v - v_old, wide.advantages
    kl = step.kappa.square() / 2 * delta.square().mean(1)
    linear, quadratic = {
        "flow_grpo": (step.kappa, step.kappa.square() / 2),
        "flow_dppo": (step.kappa, step.kappa.square() / 2),
        "grpo_guard": (step.c_v, torch.zeros_like(step.c_v)),
        "flow_cps": (2 * step.sigma * step.c_v, step.c_v.square()),
    }[name]
    log_ratio = linear * (eps * delta).mean(1) - quadratic * delta.square().mean(1)
    error = linear.abs() * (eps * delta).abs().mean(1) + quadratic * delta.square().mean(1)

    weight = -1 / step.dt if name == "grpo_guard" and wide.options.get("time_weight") != "none" else 1
    size = A.abs() * weight * log_ratio.exp() * (1 + error)
    grad = size[:, None] * (linear.abs()[:, None] * eps.abs() + 2 * quadratic[:, None] * delta.abs()) / v.shape[1]
    loss = A.abs() * weight + size
    if wide.options.get("v_ref") is not None:
        factor = {"dt": -step.dt, "two_sigma_squared": 2 * step.sigma.square()}
        scale = wide.options["kl_weight"] * factor.get(wide.options.get("kl_convention", ""), 1) * step.kappa.square()
        pull = v - wide.options["v_ref"].flatten(1)
        loss = loss + scale / 2 * pull.square().mean(1)
        grad = grad + scale[:, None] * pull.abs() / v.shape[1]

    ascent = (wide.options.get("step_size") or 0.0) * A * log_ratio.exp() / step.sigma.square()
    explained = (eps - step.kappa[:, None] * delta).square().mean(1)
    reach = kl + ascent * (log_ratio - kl) + ascent.square() / 2 * explained
    return ClosedForm(log_ratio, kl, reach, error, loss, grad.view(batch.v.shape))


# Every branch of every loss, for the tests that do not draw their options.
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("flow_grpo", {}),
    ("flow_grpo", {"kl_convention": "dt"}),
    ("flow_grpo", {"kl_convention": "two_sigma_squared", "clip": 0.0}),
    ("grpo_guard", {}),
    ("grpo_guard", {"time_weight": "none", "clip": 1e-3}),
    ("flow_cps", {}),
    ("flow_dppo", {}),
    ("flow_dppo", {"direction": "log_ratio_minus_kl", "threshold": 1e-3}),
    ("flow_dppo", {"mask": "predictive", "step_size": 0.01, "threshold": 1e-3}),
]
FULL = [(name, {**options, "reduction": "none"}) for name, options in VARIANTS]
