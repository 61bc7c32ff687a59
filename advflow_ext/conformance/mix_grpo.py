"""Tencent-Hunyuan/MixGRPO."""

from __future__ import annotations

from collections.abc import Iterator

import torch

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
    mean,
)


def mix_grpo(inputs: Inputs) -> Iterator[Row]:
    """train_grpo_flux.py, sampling_utils.py."""
    window = (8, 9, 10, 11)
    inside = torch.tensor(window)[STEPS % len(window)]
    at = Rollout("MixGRPO", inputs, "flow_sde", 0.7, shifted_once(25), inside, stochastic_steps=window)
    yield at.next_x()
    yield at.log_prob()
    yield at.stored_log_prob()
    yield at.loss(af.flow_grpo_loss, lambda v: clipped(at.log_ratio(v).exp(), inputs.A, 1e-4), clip=1e-4)

    outside = af.sde_step(inputs.v_old, inputs.x, at.table, 5, noise=inputs.step_noise).x_next
    euler = inputs.x + inputs.v_old * (at.table.sigmas[6] - at.table.sigmas[5])
    yield at.row("next x outside the window", f"sde_step(v, x, {at.table_text}, index).x_next", outside, euler)

    dance = Rollout("MixGRPO", inputs, "dance_sde", 0.3, shifted_once(25), inside, stochastic_steps=window)
    unnormalised = mean(-((dance.x_next - dance.step(inputs.v_old)[0]) ** 2)) / (2 * dance.std**2)
    yield dance.row(
        "log-probability of its Dance step", f"sde_step(v, x, {dance.table_text}, index).log_prob",
        dance.drawn.log_prob, unnormalised, "its constants are a statement of their own and dropped; ratios are equal",
    )  # fmt: skip
    yield dance.mean_log_ratio(af.flow_grpo_loss, dance.log_ratio(inputs.v), quantity="log-ratio of its Dance step")
    std = inputs.rewards.std(1, keepdim=True) + 1e-8
    yield advantage_row(
        "MixGRPO", inputs, (inputs.centred / std).clamp(-5, 5), norm="group_std", clip=5.0, eps=1e-8, ddof=1
    )
