"""Fuzm7/FlowAWR and its paper."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import advflow_ext as af
from advflow_ext.conformance.rows import (
    GROUP,
    SHAPE,
    Inputs,
    Row,
    loss_row,
    mean,
    shown,
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
