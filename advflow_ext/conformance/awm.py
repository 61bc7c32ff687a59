"""scxue/advantage_weighted_matching."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

import advflow_ext as af
from advflow_ext.conformance.rollout import (
    clipped,
)
from advflow_ext.conformance.rows import (
    Inputs,
    Row,
    advantage_row,
    loss_row,
    mean,
    shown,
)


def awm_log_prob(v: Tensor, x0: Tensor, noise: Tensor, t: Tensor, weighting: str = "ghuber") -> Tensor:
    error = mean((v.double() - (noise - x0).double()) ** 2)
    if weighting == "huber":
        return -t * ((error + 1e-10).sqrt() - 1e-5)
    if weighting == "ghuber":
        return -t * ((error + 1e-10).pow(0.25) - math.pow(1e-10, 0.25)) / 0.25
    weight = {"uniform": torch.ones_like(t), "t": t, "t2": t.square()}[weighting]
    return -error * weight


def awm_loss(
    v: Tensor, x0: Tensor, noise: Tensor, t: Tensor, advantages: Tensor, v_ema: Tensor, v_ref: Tensor | None,
    clip: float, ema_weight: float, kl_weight: float, weighting: str = "ghuber", log_prob_old: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """train_sd3_awm.py: on policy without ``log_prob_old``."""
    log_prob = awm_log_prob(v, x0, noise, t, weighting)
    loss = clipped((log_prob - (log_prob.detach() if log_prob_old is None else log_prob_old)).exp(), advantages, clip)
    if v_ref is not None:
        loss = loss + kl_weight * mean((v - v_ref) ** 2).mean()
    return loss + ema_weight * mean((v - v_ema) ** 2).mean()


def awm(inputs: Inputs) -> Iterator[Row]:
    name, A = "AWM", inputs.A

    def lp(v: Tensor, weighting: str) -> Tensor:
        return awm_log_prob(v, inputs.x0, inputs.noise, inputs.t, weighting)

    def loss(v: Tensor, weighting: str, log_prob_old: Tensor | None = None, clip: float = 1.0) -> Tensor:
        given = (inputs.x0, inputs.noise, inputs.t, A, inputs.v_ema, inputs.v_ref)
        return awm_loss(v, *given, clip, 1.0, 3e-3, weighting, log_prob_old)

    anchors = {"v_ema": inputs.v_ema, "v_ref": inputs.v_ref, "kl_weight": 3e-3}
    for weighting in ("uniform", "t", "t2", "huber", "ghuber"):
        ours = af.awm_log_prob(*inputs.forward(A)[:4], weighting=weighting)
        call = shown(af.awm_log_prob, {"weighting": weighting})
        yield Row(name, f"log-probability, {weighting}", call, (ours,), (lp(inputs.v, weighting),))
        yield loss_row(
            name, f"on-policy loss, {weighting}", af.awm_loss, inputs.forward(A), partial(loss, weighting=weighting),
            weighting=weighting, clip=1.0, **anchors,
        )  # fmt: skip
    lp_old = lp(inputs.v_old, "ghuber")
    yield loss_row(
        name, "off-policy loss, exp_first", af.awm_loss, inputs.forward(A),
        partial(loss, weighting="ghuber", log_prob_old=lp_old, clip=1e-4),
        log_prob_old=lp_old, weighting="ghuber", clip=1e-4, **anchors,
    )  # fmt: skip
    std = inputs.rewards.std(correction=0) + 1e-4
    yield advantage_row(
        name, inputs, (inputs.centred / std).clamp(-5, 5) / 5, norm="raw_global_std", clip=5.0, clip_mode="clip_divide"
    )
