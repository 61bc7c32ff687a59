"""Advantage-weighted matching (AWM, arXiv 2509.25050) on the native forward-process core."""

from __future__ import annotations

import torch
from torch import Tensor

from advflow_ext import _native, reference
from advflow_ext._native import STATS
from advflow_ext.contract import checks
from advflow_ext.contract.numbers import Number, per_sample
from advflow_ext.contract.outputs import LossOutput, Ratio
from advflow_ext.kernels.residual import residual_loss, residual_stats
from advflow_ext.ops._forward import forward_output
from advflow_ext.reference.awm import awm_arguments, awm_log_prob_arguments

_VU_SQ, _VU_ABS = STATS.index("vu_sq"), STATS.index("vu_abs")


def awm_loss(
    v: Tensor,
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    advantages: Tensor,
    *,
    v_ema: Tensor | None = None,
    v_ref: Tensor | None = None,
    log_prob_old: Tensor | None = None,
    weighting: str = "ghuber",
    power: Number = 0.25,
    draws: int = 1,
    clip: Number | tuple[Number, Number] = 1.0,
    ema_weight: Number = 1.0,
    kl_weight: Number = 0.0,
    policy_weight: Number = 1.0,
    reduction: str = "mean",
) -> LossOutput:
    """PPO's clipped objective with the matching error as log-probability (scxue/advantage_weighted_matching).

    Per sample, with u = noise - x0, D elements, <.> the mean over them, k = ``clip`` and L = <(v-u)^2>::

        ratio = exp(lp(L, t) - log_prob_old)
        loss_i = max(-A ratio, -A clip(ratio, 1-k, 1+k)) + ema_weight <(v-v_ema)^2> + kl_weight <(v-v_ref)^2>

    with the log-probability lp of :func:`awm_log_prob`. With omega = -d lp / dL, and active = 0 where the clip holds
    the ratio (A > 0 and ratio > 1+k, or A < 0 and ratio < 1-k), else 1, the gradient is exactly::

        d loss_i / dv = (2 / D) [ A omega ratio active (v-u) + ema_weight (v-v_ema) + kl_weight (v-v_ref) ]

    =========== ================================================== ============================
    weighting   lp                                                 omega
    =========== ================================================== ============================
    "uniform"   -L                                                 1
    "t"         -t L                                               t
    "t2"        -t^2 L                                             t^2
    "huber"     -t (sqrt(L + 1e-10) - 1e-5)                        t / (2 sqrt(L + 1e-10))
    "ghuber"    -(t / q) ((L + 1e-10)^q - 1e-10^q), q = ``power``  t (L + 1e-10)^(q-1)
    "adaptive"  -t^2 L / w, w = max(t <|v-u|>, 1e-5) a constant    t^2 / w
    =========== ================================================== ============================

    "adaptive" is the matching error of x0-predictions over its own scale, as in V-GRPO (arXiv 2604.23380).

    With ``draws`` = M an image is M consecutive samples, each with its own noise and t and all with one advantage, and
    has one ratio: exp of the mean over them of lp - log_prob_old (V-GRPO; FPO, arXiv 2507.21053). The gradient of the
    mean over B is then that of the mean over images. A draw that cannot be used takes its image with it.

    Arguments:
        v, x0, noise, t, v_ref, reduction: as in :func:`advantage_flow_loss`; v is the only tensor with a gradient.
        advantages: ``[B]``; the released configurations divide by the clip outside:
            ``group_advantages(rewards, K, norm="raw_global_std", clip=5.0, clip_mode="clip_divide")``.
        v_ema: velocity of the slowly following policy that anchors the step, shaped like v, or None for no such term.
        log_prob_old: ``[B]``, :func:`awm_log_prob` of the policy that is the ratio's denominator, at the same x0, noise
            and t; None is on-policy: the ratio is 1 and has a gradient, as in every released configuration.
        weighting: a row of the table.
        power: q of "ghuber", above 0.
        draws: M, B a multiple of it.
        clip: k, above 0, or a pair (below, above) for 1-below and 1+above. The clip is decided on log ratios.
        ema_weight, kl_weight: at least 0, both terms in velocity space (the released "Uniform" weights).
        policy_weight: of the clipped objective, at least 0.

    Every sample has its own ratio (the released ``loss_type="exp_first"``). Dtypes, layouts, precision, non-finite
    samples, t outside (0, 1] and errors: as in :func:`advantage_flow_loss`; a sample whose unclipped ratio overflows
    counts as non-finite. In the metrics ``policy_term`` is the clipped objective, ``rollout_deviation`` the one from
    v_ema, and ``min_curvature`` the sum of the gradient's coefficients. That may be negative without a warning, since
    the clipped objective is bounded. ``mean_log_ratio`` and ``clipped_fraction`` (active = 0) are reported too.
    """
    if not _native.serves(v, x0, noise, t, advantages, v_ema, v_ref, log_prob_old):
        return reference.awm_loss(
            v, x0, noise, t, advantages,
            v_ema=v_ema, v_ref=v_ref, log_prob_old=log_prob_old, weighting=weighting, power=power, draws=draws,
            clip=clip, ema_weight=ema_weight, kl_weight=kl_weight, policy_weight=policy_weight, reduction=reduction,
        )  # fmt: skip
    samples, numbers = awm_arguments(
        v, x0, noise, t, advantages, v_ema, v_ref, log_prob_old, weighting, power, draws, clip, ema_weight, kl_weight,
        policy_weight, reduction,
    )  # fmt: skip
    checks.require_native_dtype(samples.t.dtype, v, "awm_loss")
    stats = residual_stats(v, x0, noise, v_ema, v_ref)
    _, vo_sq, vp_sq = stats[:, :3].unbind(1)

    A = samples.advantages
    log_prob, omega = _log_prob(stats, samples.t, weighting, numbers.power)
    log_ratio = log_prob - (log_prob if log_prob_old is None else log_prob_old.detach().to(log_prob.dtype))
    if draws > 1:
        # A draw without a time has no log-probability, and its image none without it.
        log_ratio = torch.where(samples.valid_t, log_ratio, torch.nan)
        log_ratio = log_ratio.view(-1, draws).mean(1).repeat_interleave(draws)
    over, under = (A > 0) & (log_ratio > numbers.clip.log_highest), (A < 0) & (log_ratio < numbers.clip.log_lowest)
    clipped = over | under
    ratio = torch.where(over, 1 + numbers.clip.above, log_ratio.exp())
    ratio = torch.where(under, 1 - numbers.clip.below, ratio)

    scale = numbers.policy_weight
    a = torch.where(clipped, 0, scale * A * omega * ratio)
    b, c = per_sample(numbers.ema_weight, a), per_sample(numbers.kl_weight, a)
    policy_term = -scale * A * ratio
    curvature = a + b + c
    return forward_output(
        (v, x0, noise, v_ema, v_ref), stats, samples, policy_term + b * vo_sq + c * vp_sq, torch.stack([a, b, c], 1),
        reduction,
        policy_term=policy_term, curvature=curvature, nonconvex=curvature <= 0,
        extra={"mean_log_ratio": log_ratio, "clipped_fraction": clipped.to(a.dtype)},
        ratio=Ratio(log_ratio, numbers.clip.log_lowest, numbers.clip.log_highest),
    )  # fmt: skip


def awm_log_prob(
    v: Tensor, x0: Tensor, noise: Tensor, t: Tensor, *, weighting: str = "ghuber", power: Number = 0.25
) -> Tensor:
    """The log-probability of :func:`awm_loss` ``[B]``: what an off-policy trainer stores, or makes its own loss of.

    Its gradient, to v alone, is -(2 / D) omega (v-u) with the loss's omega; the scale of "adaptive" is a constant.
    float32, or float64 when a latent is. The loss computes the same bits from the same v, so that an unchanged policy
    has a ratio of exactly 1. Arguments, their requirements and their errors are those of the loss; a sample with a
    non-finite input has a non-finite log-probability and zero gradient.
    """
    if not _native.serves(v, x0, noise, t):
        return reference.awm_log_prob(v, x0, noise, t, weighting=weighting, power=power)
    t, exponent = awm_log_prob_arguments(v, x0, noise, t, weighting, power)
    return _log_prob_of(v, x0, noise, t, weighting, exponent)


def awm_log_prob_of_target(v: Tensor, target: Tensor, t: Tensor, *, weighting: str, power: Number) -> Tensor:
    """The same for trainers that have u = noise - x0 and no longer what it was made of."""
    if not _native.serves(v, target, t):
        nothing = torch.zeros((), dtype=target.dtype, device=target.device).expand_as(target)
        return reference.awm_log_prob(v, nothing, target, t, weighting=weighting, power=power)
    t, exponent = awm_log_prob_arguments(v, target, target, t, weighting, power)
    return _log_prob_of(v, target, None, t, weighting, exponent)


def _log_prob_of(v: Tensor, x0: Tensor, noise: Tensor | None, t: Tensor, weighting: str, exponent: Number) -> Tensor:
    checks.require_native_dtype(t.dtype, v, "awm_log_prob")
    log_prob, omega = _log_prob(residual_stats(v, x0, noise, None, None), t, weighting, exponent)
    slope = torch.where(torch.isfinite(log_prob) & torch.isfinite(omega), -omega, 0)
    zero = torch.zeros_like(slope)
    return residual_loss(v, x0, noise, None, None, log_prob, torch.stack([slope, zero, zero], 1))


def _log_prob(stats: Tensor, t: Tensor, weighting: str, power: Number) -> tuple[Tensor, Tensor]:
    """lp and omega in the dtype of ``stats``."""
    # float64 inside, as in the released code. It also keeps a sample independent of its batch: PyTorch's pow differs in
    # the last bit between a whole vector register and the remainder of one.
    L, time = stats[:, _VU_SQ].double(), t.double()
    if weighting == "uniform":
        log_prob, omega = -L, torch.ones_like(L)
    elif weighting == "t":
        log_prob, omega = -time * L, time
    elif weighting == "t2":
        log_prob, omega = -time.square() * L, time.square()
    elif weighting == "adaptive":
        omega = time.square() / (time * stats[:, _VU_ABS].double()).clamp(min=1e-5)
        log_prob = -omega * L
    elif weighting == "huber":
        root = (L + 1e-10).sqrt()
        log_prob, omega = -time * (root - 1e-5), time / (2 * root)
    else:
        log_prob = -time / power * ((L + 1e-10).pow(power) - 1e-10**power)
        omega = time * (L + 1e-10).pow(power - 1)
    return log_prob.to(stats.dtype), omega.to(stats.dtype)
