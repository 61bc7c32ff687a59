"""The papers of AdvantageFlow and of MeanFlowAdvantage."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

import advflow_ext as af
from advflow_ext.conformance.rows import (
    SHAPE,
    Inputs,
    Row,
    advantage_row,
    loss_row,
    mean,
)


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
