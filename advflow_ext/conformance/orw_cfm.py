"""markerthu/orw-cfm."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import advflow_ext as af
from advflow_ext.conformance.rows import (
    Inputs,
    Row,
    loss_row,
    mean,
    widened,
)


def orw_cfm_loss(
    v: Tensor, x0: Tensor, noise: Tensor, rewards: Tensor, v_ref: Tensor | None, tau: float, kl_weight: float
) -> Tensor:
    """finetune_fm.py, whose time runs from noise to data: its velocities are minus ours, which squares do not see."""
    v = widened(v)
    losses = torch.exp(tau * rewards) * mean((v - (widened(noise) - widened(x0))) ** 2)
    if v_ref is not None:
        losses = losses + kl_weight * mean((v - widened(v_ref)) ** 2)
    return losses.mean()


def orw_cfm(inputs: Inputs) -> Iterator[Row]:
    def loss(v: Tensor) -> Tensor:
        return orw_cfm_loss(v, inputs.x0, inputs.noise, inputs.A, inputs.v_ref, tau=0.5, kl_weight=1.0)

    yield loss_row(
        "ORW-CFM", "loss", af.reward_weighted_loss, inputs.forward(inputs.A), loss,
        method="exp", tau=0.5, v_ref=inputs.v_ref, kl_weight=1.0,
    )  # fmt: skip
