"""The DiffusionNFT loss (arXiv 2509.16117) as released, on the native forward-process core."""

from __future__ import annotations

import torch
from torch import Tensor

from advflow_ext import _native, reference
from advflow_ext.contract import checks
from advflow_ext.contract.numbers import Number, per_sample
from advflow_ext.contract.outputs import LossOutput
from advflow_ext.kernels.residual import residual_stats
from advflow_ext.ops._forward import forward_output
from advflow_ext.reference.diffusion_nft import diffusion_nft_arguments


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
    """Negative-aware fine-tuning with two implicit policies, as coded in NVlabs/DiffusionNFT (train_nft_sd3.py).

    Per sample, with u = noise - x0, D elements, <.> the mean over them, c = ``adv_clip_max``, A clipped to [-c, c],
    r = 1/2 + A / (2c) and the implicit policies v+ = v_old + beta (v - v_old), v- = v_old - beta (v - v_old)::

        loss_i = (c / beta) t^2 [ r <(v+ - u)^2> / w+  +  (1-r) <(v- - u)^2> / w- ] + kl_weight <(v - v_ref)^2>
        w+- = max(t <|v+- - u|>, 1e-5), treated as a constant

    which is what the released code computes from x0-predictions, whose residuals are -t times these. With P+ = r / w+,
    P- = (1-r) / w- and m = c t^2 the gradient is::

        d loss_i / dv = (2 / D) [ m (P+ - P-) (v-u) + m ((beta-1) P+ + (beta+1) P-) (v-v_old) + kl_weight (v-v_ref) ]

    The two data coefficients add up to m beta (P+ + P-) > 0: every sample's loss has a minimum, whatever its advantage.

    Arguments:
        v, x0, noise, t, v_ref, reduction: as in :func:`advantage_flow_loss`; v is the only tensor with a gradient.
        advantages: ``[B]``, centred and divided by a deviation but not yet by ``adv_clip_max``: the released code's are
            ``group_advantages(rewards, K, norm="raw_global_std", clip=None)``.
        v_old: velocity of the rollout policy, shaped like v.
        beta: how far the implicit policies stand from the rollout policy, above 0 (released configurations: 1, or 0.1).
        adv_clip_max: c, above 0.
        kl_weight: weight of the reference term, at least 0, in velocity space (the trainer's ``train.beta``).
        policy_weight: of everything but the reference term, at least 0.
        adaptive: False drops w+-, which leaves the paper's loss in prediction space at the code's scale. Its gradient
            is that of ``c * advantage_flow_loss(A / c, gamma="beta(beta-A)", beta=beta, lam=0) / beta``.
        mode: the trainer's ``adv_mode``, applied to the clipped advantages: "all"; "positive" and "negative" set the
            others to 0; "one" makes positive ones 1 and the others 0; "binary" keeps the sign.

    Dtypes, layouts, precision, non-finite samples, t outside (0, 1] and errors: as in :func:`advantage_flow_loss`. The
    released code rounds v+- to half precision under autocast and takes w+- in float64; here neither is rounded below
    float32. ``policy_term`` is the loss without the reference term; ``min_curvature`` includes the weights m and P+-.
    """
    if not _native.serves(v, x0, noise, t, advantages, v_old, v_ref):
        return reference.diffusion_nft_loss(
            v, x0, noise, t, advantages,
            v_old=v_old, v_ref=v_ref, beta=beta, adv_clip_max=adv_clip_max, kl_weight=kl_weight,
            policy_weight=policy_weight, adaptive=adaptive, mode=mode, reduction=reduction,
        )  # fmt: skip
    samples, (scale, clip, kl_scale, policy_scale) = diffusion_nft_arguments(
        v, x0, noise, t, advantages, v_old, v_ref, beta, adv_clip_max, kl_weight, policy_weight, adaptive, mode,
        reduction,
    )  # fmt: skip
    checks.require_native_dtype(samples.t.dtype, v, "diffusion_nft_loss")
    stats = residual_stats(v, x0, noise, v_old, v_ref, scale if adaptive else 0.0)
    vu_sq, vo_sq, vp_sq, ou_sq, _, _, plus_abs, minus_abs = stats.unbind(1)

    signal = _signal(samples.advantages, mode, clip)
    if adaptive:
        inverse_plus = 1 / (samples.t * plus_abs).clamp(min=1e-5)
        inverse_minus = 1 / (samples.t * minus_abs).clamp(min=1e-5)
    else:
        inverse_plus = inverse_minus = torch.ones_like(samples.t)
    plus = (1 + signal) / 2 * inverse_plus
    minus = (1 - signal) / 2 * inverse_minus
    # Not plus - minus: at the first step (w+ = w-) that would lose the digits of a small advantage.
    difference = (inverse_plus - inverse_minus + signal * (inverse_plus + inverse_minus)) / 2

    m = policy_scale * clip * samples.t.square()
    a = m * difference
    b = m * ((scale - 1) * plus + (scale + 1) * minus)
    z = m * ((1 / scale - 1) * plus + (1 / scale + 1) * minus)
    kl = per_sample(kl_scale, a)
    policy_term = a * vu_sq + b * vo_sq + z * ou_sq
    curvature = m * scale * (plus + minus) + kl
    return forward_output(
        (v, x0, noise, v_old, v_ref), stats, samples, policy_term + kl * vp_sq, torch.stack([a, b, kl], 1), reduction,
        policy_term=policy_term, curvature=curvature, nonconvex=curvature <= 0,
    )  # fmt: skip


def _signal(advantages: Tensor, mode: str, clip: Number) -> Tensor:
    """2r - 1, in [-1, 1]."""
    clipped = torch.clamp(advantages, -clip, clip)  # type: ignore[arg-type]  # both are numbers or both tensors
    if mode == "positive":
        clipped = clipped.clamp(min=0)
    elif mode == "negative":
        clipped = clipped.clamp(max=0)
    elif mode == "one":
        clipped = (clipped > 0).to(clipped.dtype)
    elif mode == "binary":
        clipped = clipped.sign()
    return (clipped / clip).clamp(-1, 1)
