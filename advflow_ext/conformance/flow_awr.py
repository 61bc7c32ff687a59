"""Fuzm7/FlowAWR and its paper."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import advflow_ext as af
from advflow_ext.conformance.rows import (
    GROUP,
    Inputs,
    Row,
    column,
    loss_row,
    mean,
    shown,
)


def flow_awr_loss(
    v: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, advantages: Tensor, v_old: Tensor, v_ref: Tensor | None,
    kl_weight: float,
) -> Tensor:  # fmt: skip
    """train_awr_sd3.py with energy_mode: the float64 advantages and scale promote every element."""
    t = column(t, v)
    x0_old = x_t - t * v_old
    target = x0_old + column(advantages, v) * (x0 - x0_old)
    prediction = x_t - t * v
    with torch.no_grad():
        scale = column(mean((prediction.double() - x0.double()).abs()), v).clamp(min=1e-5)
    loss = mean((prediction - target) ** 2 / scale).mean()
    return loss if v_ref is None else loss + kl_weight * mean((v - v_ref) ** 2).mean()


def flow_awr(inputs: Inputs) -> Iterator[Row]:
    """The released loss, stat_tracking.py (hard_gating for rewards by rule), and the paper's form."""
    energies = (2 * inputs.A).clamp(-3, 3)
    E, arguments = column(energies, inputs.v), inputs.forward(energies)

    def loss(v: Tensor) -> Tensor:
        given = (inputs.x0, inputs.x_t, inputs.t, energies, inputs.v_old, inputs.v_ref)
        return flow_awr_loss(v, *given, kl_weight=1e-4)

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
