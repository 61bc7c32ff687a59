"""NVlabs/DiffusionNFT, its paper, and UniRL."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import advflow_ext as af
from advflow_ext.conformance.rows import (
    Inputs,
    Row,
    advantage_row,
    column,
    loss_row,
    mean,
    shown,
    with_gradient,
)


def two_branches(
    v: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, r: Tensor, v_old: Tensor, v_ref: Tensor | None,
    beta: float, adv_clip_max: float, kl_weight: float,
) -> Tensor:  # fmt: skip
    """Two branches of x0-predictions, each divided by its own mean absolute error, whose float64 promotes every
    element."""
    t = column(t, v)

    def branch(mixed: Tensor) -> Tensor:
        prediction = x_t - t * mixed
        with torch.no_grad():
            scale = column(mean((prediction.double() - x0.double()).abs()), v).clamp(min=1e-5)
        return mean((prediction - x0) ** 2 / scale)

    positive = branch(beta * v + (1 - beta) * v_old)
    negative = branch((1 + beta) * v_old - beta * v)
    loss = ((r * positive / beta + (1 - r) * negative / beta) * adv_clip_max).mean()
    return loss if v_ref is None else loss + kl_weight * mean((v - v_ref) ** 2).mean()


def diffusion_nft_loss(
    v: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, advantages: Tensor, v_old: Tensor, v_ref: Tensor | None,
    beta: float, adv_clip_max: float, kl_weight: float,
) -> Tensor:  # fmt: skip
    """NVlabs' train_nft_sd3.py."""
    r = (advantages.clamp(-adv_clip_max, adv_clip_max) / adv_clip_max / 2 + 0.5).clamp(0, 1)
    return two_branches(v, x0, x_t, t, r, v_old, v_ref, beta, adv_clip_max, kl_weight)


def of_share(inputs: Inputs, v: Tensor, r: Tensor) -> Tensor:
    """Of the trainers that took it over: r their own way, beta 1, adv_clip_max 5, a KL weight of 1e-4."""
    return two_branches(
        v, inputs.x0, inputs.x_t, inputs.t, r, inputs.v_old, inputs.v_ref, beta=1.0, adv_clip_max=5.0, kl_weight=1e-4
    )


def diffusion_nft(inputs: Inputs) -> Iterator[Row]:
    """NVlabs' train_nft_sd3.py, UniRL's algorithms/diffusionnft.py (ref_deviation_coef 1e-4), and the paper's loss."""
    name, A = "DiffusionNFT", 2 * inputs.A
    arguments = inputs.forward(A)
    bounded = A.clamp(-5, 5)

    def released(v: Tensor, advantages: Tensor, beta: float) -> Tensor:
        given = (inputs.x0, inputs.x_t, inputs.t, advantages, inputs.v_old, inputs.v_ref)
        return diffusion_nft_loss(v, *given, beta=beta, adv_clip_max=5.0, kl_weight=1e-4)

    adv_modes = {
        "all": bounded,
        "positive": bounded.clamp(min=0),
        "negative": bounded.clamp(max=0),
        "one": (bounded > 0).double(),
        "binary": bounded.sign(),
    }
    for beta in (1.0, 0.1):
        for mode, advantages in adv_modes.items() if beta == 1 else [("all", bounded)]:
            yield loss_row(
                name, f"loss, beta {beta:g}, adv_mode {mode}", af.diffusion_nft_loss, arguments,
                partial(released, advantages=advantages, beta=beta),
                v_old=inputs.v_old, v_ref=inputs.v_ref, beta=beta, adv_clip_max=5.0, kl_weight=1e-4, mode=mode,
            )  # fmt: skip

    std = inputs.rewards.std(correction=0) + 1e-4
    yield advantage_row(name, inputs, inputs.centred / std, norm="raw_global_std", clip=None)
    yield loss_row(
        "UniRL DiffusionNFT", "loss", af.diffusion_nft_loss, arguments,
        partial(of_share, inputs, r=bounded / 10 + 0.5),
        v_old=inputs.v_old, v_ref=inputs.v_ref, beta=1.0, adv_clip_max=5.0, kl_weight=1e-4,
    )  # fmt: skip

    A = inputs.A.clamp(-1, 1)
    r, beta = (1 + A) / 2, 0.5

    def paper(v: Tensor) -> Tensor:
        positive, negative = inputs.v_old + beta * (v - inputs.v_old), inputs.v_old - beta * (v - inputs.v_old)
        return (r * mean((positive - inputs.u) ** 2) + (1 - r) * mean((negative - inputs.u) ** 2)).mean()

    options: dict[str, Any] = {"gamma": "beta(beta-A)", "beta": beta, "lam": 0.0, "weighting": "velocity"}
    given = (inputs.x0, inputs.noise, inputs.t, A)
    ours = with_gradient(lambda v: af.advantage_flow_loss(v, *given, v_old=inputs.v_old, **options).loss, inputs.v)
    theirs = with_gradient(paper, inputs.v)
    call = shown(af.advantage_flow_loss, {"v_old": inputs.v_old, **options})
    yield Row("DiffusionNFT paper", "gradient of the loss", call, ours[1:], theirs[1:])
