"""XueZeyue/DanceGRPO."""

from __future__ import annotations

from collections.abc import Iterator

import advflow_ext as af
from advflow_ext.conformance.rollout import (
    Rollout,
    clipped,
    shifted_once,
)
from advflow_ext.conformance.rows import (
    STEPS,
    Inputs,
    Row,
    advantage_row,
)


def dance_grpo(inputs: Inputs) -> Iterator[Row]:
    """train_grpo_flux.py."""
    at = Rollout("DanceGRPO", inputs, "dance_sde", 0.3, shifted_once(16), STEPS % 9)
    yield at.next_x()
    yield at.log_prob()
    yield at.stored_log_prob()
    yield at.mean_log_ratio(af.flow_grpo_loss, at.log_ratio(inputs.v))
    yield at.loss(af.flow_grpo_loss, lambda v: clipped(at.log_ratio(v).exp(), inputs.A, 1e-4), clip=1e-4)
    std = inputs.rewards.std(1, keepdim=True) + 1e-8
    yield advantage_row(
        "DanceGRPO", inputs, (inputs.centred / std).clamp(-5, 5), norm="group_std", clip=5.0, eps=1e-8, ddof=1
    )
