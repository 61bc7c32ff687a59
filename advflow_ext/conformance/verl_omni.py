"""verl-project/verl-omni."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

import advflow_ext as af
from advflow_ext.conformance.diffusion_nft import of_share
from advflow_ext.conformance.grpo_guard import GUARD_CLIP, guard_of_means
from advflow_ext.conformance.rollout import (
    Rollout,
    clipped,
    kept,
    shifted_twice,
)
from advflow_ext.conformance.rows import (
    STEPS,
    Inputs,
    Row,
    advantage_row,
    loss_row,
)


def verl_omni(inputs: Inputs) -> Iterator[Row]:
    """trainer/diffusion/diffusion_algos.py, pipelines/schedulers."""
    name, A = "verl-omni", inputs.A
    sigmas = shifted_twice(10)
    at = Rollout(name, inputs, "flow_sde", 0.7, sigmas, STEPS % 9)

    def loss(v: Tensor) -> Tensor:
        kl = at.squared_drift(v, inputs.v_ref) * at.h / (2 * at.std**2)  # its std_dev_t lacks sqrt(-dt)
        return clipped(at.log_ratio(v).exp(), A, 1e-4) + 0.04 * kl.mean()

    def dppo_loss(v: Tensor) -> Tensor:
        log_ratio = at.log_ratio(v)
        keep = kept(A, log_ratio, at.squared_drift(v, inputs.v_old) / (2 * at.std**2), 1e-5)
        return torch.where(keep, -A * log_ratio.exp(), 0).mean()

    yield at.log_prob()
    yield at.stored_log_prob()
    yield at.stored_noise()
    yield at.stored_means()
    yield at.loss(
        af.flow_grpo_loss, loss, quantity="flow_grpo loss",
        clip=1e-4, v_ref=inputs.v_ref, kl_weight=0.04, kl_convention="dt",
    )  # fmt: skip
    yield at.loss(af.flow_dppo_loss, dppo_loss, quantity="flow_dppo loss", threshold=1e-5)
    for sampler, level in (("cps", 0.8), ("dance_sde", 0.3)):
        other = Rollout(name, inputs, sampler, level, sigmas, STEPS % 9)
        yield other.kl_old(
            other.squared_drift(inputs.v, inputs.v_old) / (2 * other.std**2 * other.h),
            "it multiplies a whole sigma by sqrt(-dt) again; in a batch of one step threshold times -dt",
            quantity=f"KL to the rollout policy, {sampler}",
        )  # fmt: skip
    guard = Rollout(name, inputs, "flow_sde", 0.7, sigmas, torch.full_like(STEPS, 3))
    yield guard.loss(
        af.grpo_guard_loss, partial(guard_of_means, guard, False),
        quantity="grpo_guard loss of one step", clip=GUARD_CLIP,
    )  # fmt: skip
    yield at.loss(
        af.grpo_guard_loss, partial(guard_of_means, at, False),
        "its sigma and dt are means over the batch; equal where a batch is of one step",
        quantity="grpo_guard loss of mixed steps", clip=GUARD_CLIP,
    )  # fmt: skip
    yield loss_row(
        name, "diffusion_nft loss", af.diffusion_nft_loss, inputs.forward(A),
        partial(of_share, inputs, r=(A.clamp(-5, 5) / 5 + 1) / 2),
        v_old=inputs.v_old, v_ref=inputs.v_ref, beta=1.0, adv_clip_max=5.0, kl_weight=1e-4,
    )  # fmt: skip
    yield advantage_row(
        name, inputs, (inputs.centred / (inputs.rewards.std() + 1e-4)).clamp(-5, 5),
        norm="raw_global_std", clip=5.0, ddof=1,
    )  # fmt: skip
