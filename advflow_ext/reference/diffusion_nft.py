"""The DiffusionNFT loss in plain differentiable PyTorch, written as NVlabs/DiffusionNFT's train_nft_sd3.py does."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from advflow_ext.contract import checks
from advflow_ext.contract.batches import any_batch
from advflow_ext.contract.numbers import (
    Number,
    Numbers,
    per_sample,
)
from advflow_ext.contract.outputs import LossOutput
from advflow_ext.reference._forward import flatten, forward_output, mean

NFT_MODES = ("all", "positive", "negative", "one", "binary")
NFT_SPELLINGS = {f"{mode}_only": mode for mode in ("positive", "negative", "one")}  # NVlabs/DiffusionNFT's


class NftNumbers(NamedTuple):
    beta: Number
    adv_clip_max: Number
    kl_weight: Number
    policy_weight: Number


def diffusion_nft_arguments(
    v: Tensor,
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    advantages: Tensor,
    v_old: Tensor,
    v_ref: Tensor | None,
    beta: Number,
    adv_clip_max: Number,
    kl_weight: Number,
    policy_weight: Number,
    adaptive: bool,
    mode: str,
    reduction: str,
) -> tuple[torch.dtype, Numbers, NftNumbers]:
    dtype = checks.require_samples(
        v, t, "advantages", advantages, reduction, x0=x0, noise=noise, v_old=v_old, v_ref=v_ref
    )
    numbers = Numbers(v, dtype)
    given = NftNumbers(
        numbers.read("beta", beta, low=0.0, exclusive=True),
        numbers.read("adv_clip_max", adv_clip_max, low=0.0, exclusive=True),
        numbers.weight_of("kl_weight", kl_weight, "v_ref", v_ref, default=1e-4),
        numbers.read("policy_weight", policy_weight, low=0.0),
    )
    checks.require_flag("adaptive", adaptive)
    checks.require_choice("mode", mode, NFT_MODES)
    return dtype, numbers, given


@any_batch
def diffusion_nft_loss(
    v: Tensor,
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    advantages: Tensor,
    *,
    v_old: Tensor,
    v_ref: Tensor | None = None,
    beta: Number = 1.0,
    adv_clip_max: Number = 5.0,
    kl_weight: Number = 1e-4,
    policy_weight: Number = 1.0,
    adaptive: bool = True,
    mode: str = "all",
    reduction: str = "mean",
) -> LossOutput:
    """Same arguments, result and errors as :func:`advflow_ext.diffusion_nft_loss`, by PyTorch autograd.

    x_t and the x0-predictions are formed as in the trainer. In float32 that costs digits as t goes to 0 (about
    1e-7 / t relative), which the fused op does not lose.
    """
    mode = checks.spelled(mode, NFT_SPELLINGS)
    dtype, numbers, (beta, clip, kl_scale, policy_scale) = diffusion_nft_arguments(
        v, x0, noise, t, advantages, v_old, v_ref, beta, adv_clip_max, kl_weight, policy_weight, adaptive, mode,
        reduction,
    )  # fmt: skip
    samples = checks.samples_in(dtype, t, advantages).usable_with(numbers)
    adv_clip_max = per_sample(clip, samples.t)
    latents = flatten(samples, v, x0, noise, v_old, v_ref)
    assert latents.v_old is not None
    time = samples.t[:, None]
    x_t = (1 - time) * latents.x0 + time * latents.noise

    advantages_clip = samples.advantages.clamp(-adv_clip_max, adv_clip_max)
    if mode == "positive":
        advantages_clip = advantages_clip.clamp(min=0)
    elif mode == "negative":
        advantages_clip = advantages_clip.clamp(max=0)
    elif mode == "one":
        advantages_clip = torch.where(advantages_clip > 0, 1.0, 0.0).to(advantages_clip)
    elif mode == "binary":
        advantages_clip = torch.sign(advantages_clip)
    r = (advantages_clip / adv_clip_max / 2.0 + 0.5).clamp(0, 1)

    def branch(implicit_velocity: Tensor) -> tuple[Tensor, Tensor]:
        error = x_t - time * implicit_velocity - latents.x0
        weight = mean(error.detach().abs()).clamp(min=1e-5) if adaptive else torch.ones_like(samples.t)
        return mean(error.square()) / weight, weight

    scale = beta[:, None] if isinstance(beta, Tensor) and beta.dim() else beta
    positive_loss, positive_weight = branch(scale * latents.v + (1 - scale) * latents.v_old)
    negative_loss, negative_weight = branch((1 + scale) * latents.v_old - scale * latents.v)
    policy_term = (r * positive_loss / beta + (1 - r) * negative_loss / beta) * adv_clip_max * policy_scale
    reference = latents.deviation(latents.v_ref)
    with torch.no_grad():
        data, rollout = latents.deviation(latents.u), latents.deviation(latents.v_old)

    curvature = adv_clip_max * samples.t.square() * beta * (r / positive_weight + (1 - r) / negative_weight)
    data_weight = policy_scale * curvature
    curvature = data_weight + kl_scale
    return forward_output(
        latents, samples, policy_term + kl_scale * reference, reduction,
        policy_term=policy_term, deviations=(data, rollout, reference),
        weights=(data_weight / beta, data_weight * (1 + 1 / beta), kl_scale),
        curvature=curvature, nonconvex=curvature <= 0,
    )  # fmt: skip
