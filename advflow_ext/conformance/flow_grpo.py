"""yifan123/flow_grpo: Flow-GRPO, its CPS sampler, and its weighted likelihoods (RWR, SFT)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

import advflow_ext as af
from advflow_ext.conformance.rollout import (
    Rollout,
    StepInParts,
    clipped,
    log_prob,
    log_prob_without_variance,
    shifted_twice,
)
from advflow_ext.conformance.rows import (
    STEPS,
    TRANSITIONS,
    Inputs,
    Row,
    advantage_row,
    loss_row,
    mean,
)


def flow_grpo_loss(
    step: StepInParts, v: Tensor, v_ref: Tensor | None, x_next: Tensor, log_prob_old: Tensor, advantages: Tensor,
    clip: float, kl_weight: float,
) -> Tensor:  # fmt: skip
    """train_sd3.py: its KL divides by std_dev_t, which lacks sqrt(-dt)."""
    mu, std_dev_t, sqrt_dt = step(v)
    log_ratio = log_prob(x_next, (mu, std_dev_t * sqrt_dt)) - log_prob_old
    loss = clipped(log_ratio.exp(), advantages, clip)
    if v_ref is not None:
        with torch.no_grad():
            mu_ref = step(v_ref)[0]
        loss = loss + kl_weight * (mean((mu - mu_ref) ** 2) / (2 * std_dev_t.flatten() ** 2)).mean()
    return loss


def flow_grpo(inputs: Inputs) -> Iterator[Row]:
    """train_sd3.py, train_sd3_fast.py (CPS), train_sd3_sft.py."""
    at = Rollout("flow_grpo", inputs, "flow_sde", 0.7, shifted_twice(10), STEPS % 9)
    std_dev_t = at.std / at.h.sqrt()

    def kl(v: Tensor) -> Tensor:
        return at.squared_drift(v, inputs.v_ref) / (2 * std_dev_t**2)

    def loss(v: Tensor) -> Tensor:
        return flow_grpo_loss(
            at.step_in_parts, v, inputs.v_ref, at.x_next, at.log_prob_old(), inputs.A, clip=1e-4, kl_weight=0.04
        )

    yield at.kl_of_a_change(8, "shift 3 twice")
    yield at.sigma_at_one("sigma at s = 1", at.std[:1])
    yield at.next_x()
    yield at.log_prob()
    yield at.stored_log_prob()
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

    yield fast.stored_log_prob(variance=False, quantity="log-probability of a stored transition, CPS")
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
