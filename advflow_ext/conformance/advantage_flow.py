"""The papers of AdvantageFlow and of MeanFlowAdvantage."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

import advflow_ext as af
from advflow_ext.conformance.rows import (
    Inputs,
    Row,
    advantage_row,
    column,
    loss_row,
    mean,
)


def advantage_flow_losses(
    v: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, advantages: Tensor, v_old: Tensor, v_ref: Tensor | None,
    gamma: float | Tensor, lam: float,
) -> Tensor:  # fmt: skip
    """Eq. 5 [B] in predictions of x0, whose squared norms the paper sums, over the number of elements."""
    t = column(t, v)
    prediction = x_t - t * v
    with torch.no_grad():
        old = x_t - t * v_old
        reference = None if v_ref is None else x_t - t * v_ref
    losses = advantages * mean((prediction - x0) ** 2) + gamma * mean((prediction - old) ** 2)
    return losses if reference is None else losses + lam * mean((prediction - reference) ** 2)


def advantage_flow_loss(
    v: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, advantages: Tensor, v_old: Tensor, v_ref: Tensor | None,
    gamma: float | Tensor, lam: float,
) -> Tensor:  # fmt: skip
    return advantage_flow_losses(v, x0, x_t, t, advantages, v_old, v_ref, gamma, lam).mean()


def advantage_flow(inputs: Inputs) -> Iterator[Row]:
    """AdvantageFlow's eq. 5 and 6, and the shared scale of MeanFlowAdvantage (eq. 12)."""
    A = inputs.A.clamp(-1, 1)
    arguments = inputs.forward(A)
    given = (inputs.x0, inputs.x_t, inputs.t)
    anchors = (inputs.v_old, inputs.v_ref)

    def quadratic(v: Tensor, data_weight: Tensor, rollout_weight: Tensor) -> Tensor:
        return advantage_flow_loss(v, *given, data_weight, *anchors, rollout_weight, 1e-3)

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
        w = mean((inputs.x_t - column(inputs.t, v) * v - inputs.x0).detach().abs()).clamp(min=1e-5)
        return (advantage_flow_losses(v, *given, A, *anchors, 1.1, 1e-3) / w).mean()

    yield loss_row(
        "MeanFlowAdvantage", "loss at s = t", af.advantage_flow_loss, arguments, shared_scale,
        v_old=inputs.v_old, v_ref=inputs.v_ref, gamma=1.1, lam=1e-3, weighting="adaptive",
    )  # fmt: skip
