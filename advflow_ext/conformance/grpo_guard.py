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
    clipped,
    shifted_once,
    shifted_twice,
)
from advflow_ext.conformance.rows import (
    STEPS,
    Inputs,
    Row,
)

GUARD_CLIP = 2e-6


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
