"""IamCreateAI/FlowCPS."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import advflow_ext as af
from advflow_ext.conformance.rollout import (
    Rollout,
    Step,
    clipped,
    log_prob_without_variance,
    shifted_twice,
)
from advflow_ext.conformance.rows import (
    STEPS,
    Inputs,
    Row,
    advantage_row,
)


def flow_cps_loss(
    step: Step, v: Tensor, v_ref: Tensor | None, x_next: Tensor, log_prob_old: Tensor, advantages: Tensor,
    clip: float, kl_weight: float,
) -> Tensor:  # fmt: skip
    """train_sd3.py: neither its log-probabilities nor its KL have a variance."""
    mu, std = step(v)
    log_ratio = log_prob_without_variance(x_next, (mu, std)) - log_prob_old
    loss = clipped(log_ratio.exp(), advantages, clip)
    if v_ref is not None:
        with torch.no_grad():
            mu_ref = step(v_ref)[0]
        loss = loss + kl_weight * ((mu - mu_ref) ** 2).mean()
    return loss


def flow_cps(inputs: Inputs) -> Iterator[Row]:
    """train_sd3.py."""
    at = Rollout("FlowCPS", inputs, "cps", 0.8, shifted_twice(10), STEPS % 9)
    log_ratio = at.log_ratio(inputs.v, log_prob_without_variance)
    kl = at.squared_drift(inputs.v, inputs.v_ref)

    def loss(v: Tensor) -> Tensor:
        log_prob_old = at.log_prob_old(log_prob_without_variance)
        return flow_cps_loss(at.step, v, inputs.v_ref, at.x_next, log_prob_old, inputs.A, clip=1e-4, kl_weight=0.04)

    yield at.kl_of_a_change(8, "shift 3 twice")
    yield at.next_x()
    yield at.stored_log_prob(variance=False)
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
