"""X-GenGroup/Flow-Factory."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

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


def flow_factory(inputs: Inputs) -> Iterator[Row]:
    """trainers/grpo.py with kl_type x-based, advantage/advantage_processor.py, scheduler/."""
    at = Rollout("Flow-Factory", inputs, "flow_sde", 0.7, shifted_once(10), STEPS % 9)

    def loss(v: Tensor) -> Tensor:
        return clipped(at.log_ratio(v).exp(), inputs.A, 1e-4) + 0.01 * at.squared_drift(v, inputs.v_ref).mean()

    yield at.kl_of_a_change(8, "shift 3 once")
    yield at.stored_log_prob()
    yield at.loss(
        af.flow_grpo_loss, loss, clip=1e-4, v_ref=inputs.v_ref, kl_weight=0.01, kl_convention="two_sigma_squared"
    )
    std = max(float(inputs.rewards.std(correction=0)), 1e-6)
    yield advantage_row(
        "Flow-Factory", inputs, (inputs.centred / std).clamp(-5, 5), norm="raw_global_std", clip=5.0, eps=0.0
    )
