"""markerthu/orw-cfm."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

import advflow_ext as af
from advflow_ext.conformance.rows import (
    Inputs,
    Row,
    loss_row,
    mean,
)


def orw_cfm(inputs: Inputs) -> Iterator[Row]:
    """finetune_fm.py, whose time runs from noise to data: its velocities are minus ours."""

    def loss(v: Tensor) -> Tensor:
        data, noise = inputs.x0, inputs.noise
        matching = mean((-v - (data - noise)) ** 2)
        return ((0.5 * inputs.A).exp() * matching + 1.0 * mean((-v + inputs.v_ref) ** 2)).mean()

    yield loss_row(
        "ORW-CFM", "loss", af.reward_weighted_loss, inputs.forward(inputs.A), loss,
        method="exp", tau=0.5, v_ref=inputs.v_ref, kl_weight=1.0,
    )  # fmt: skip
