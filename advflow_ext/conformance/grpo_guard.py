"""GRPO-Guard, as flow_grpo and Flow-Factory have it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import advflow_ext as af
from advflow_ext.conformance.rollout import (
    Rollout,
    StepInParts,
    clipped,
    log_prob,
    shifted_once,
    shifted_twice,
)
from advflow_ext.conformance.rows import (
    STEPS,
    Inputs,
    Row,
    mean,
)

GUARD_CLIP = 2e-6


def guard_ratio(log_ratio: Tensor, drift: Tensor, sigma: Tensor) -> Tensor:
    """RatioNorm: the drift of the mean is added to the log-ratio, and the sum scaled by sigma."""
    return ((log_ratio + drift / (2 * sigma**2)) * sigma).exp()


def grpo_guard_loss(
    step: StepInParts, v: Tensor, v_ref: Tensor | None, x_next: Tensor, log_prob_old: Tensor, mean_old: Tensor,
    advantages: Tensor, clip: float, kl_weight: float, mean_drift: bool = False,
) -> Tensor:  # fmt: skip
    """sigma and dt are means over the batch (flow_grpo and verl-omni), and with ``mean_drift`` the drift is too
    (flow_grpo, whose ``mean`` over no dimension is one over all). The KL has the whole sigma, as everybody else's; the
    released line divides by std_dev_t alone."""
    mu, std_dev_t, sqrt_dt = step(v)
    log_ratio = log_prob(x_next, (mu, std_dev_t * sqrt_dt)) - log_prob_old
    sqrt_dt = sqrt_dt.mean()
    sigma = std_dev_t.mean() * sqrt_dt
    drift = mean((mu - mean_old) ** 2)
    ratio = guard_ratio(log_ratio, drift.mean() if mean_drift else drift, sigma)
    loss = clipped(ratio, advantages, clip) / sqrt_dt**2
    if v_ref is not None:
        with torch.no_grad():
            mu_ref = step(v_ref)[0]
        loss = loss + kl_weight * (mean((mu - mu_ref) ** 2) / (2 * sigma**2)).mean()
    return loss


def guard_of_means(at: Rollout, mean_drift: bool, v: Tensor) -> Tensor:
    return grpo_guard_loss(
        at.step_in_parts, v, None, at.x_next, at.log_prob_old(), at.mean_old, at.given.A, GUARD_CLIP, 0.0, mean_drift
    )


def guard_of_each(at: Rollout, sigma: Tensor, v: Tensor) -> Tensor:
    ratio = guard_ratio(at.log_ratio(v), at.squared_drift(v, at.given.v_old), sigma)
    return clipped(ratio, at.given.A, GUARD_CLIP)


def grpo_guard(inputs: Inputs) -> Iterator[Row]:
    """flow_grpo's train_sd3_GRPO_Guard.py and Flow-Factory's trainers/rl/grpo.py, before that trainers/grpo.py."""
    name, sigmas, op = "GRPO-Guard (flow_grpo)", shifted_twice(10), af.grpo_guard_loss
    same, mixed = torch.full_like(STEPS, 3), STEPS % 9
    at = Rollout(name, inputs, "flow_sde", 0.7, sigmas, same)
    log_ratio = guard_ratio(at.log_ratio(inputs.v), at.squared_drift(inputs.v, inputs.v_old), at.std).log()
    yield at.stored_means()
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
