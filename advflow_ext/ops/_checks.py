"""Argument checks shared by every implementation of a loss, so that native and reference refuse the same calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from advflow_ext.ops._numbers import (
    ClipRange,
    Number,
    Numbers,
    constant,
    is_number,
    per_sample,
    values_are_at_hand,
)
from advflow_ext.ops._outputs import warn_nonconvex

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def require_choice(name: str, value: object, accepted: Sequence[str]) -> None:
    if value not in accepted:
        listed = ", ".join(repr(choice) for choice in accepted)
        raise ValueError(f"{name} is {value!r}; accepted are {listed}.")


def require_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}; accepted are True and False.")


def require_group_size(group_size: object, rewards: Tensor) -> None:
    if isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 2:
        raise ValueError(
            f"group_size is {group_size!r}; accepted is an integer of at least 2, since one image alone has no group "
            "to differ from."
        )
    if rewards.dim() != 1 or rewards.shape[0] % group_size:
        raise ValueError(
            f"rewards has shape {list(rewards.shape)}; accepted is [L*K], a multiple of group_size {group_size}."
        )


def require_float_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} is a {type(value).__name__}; accepted is a floating-point torch.Tensor.")
    if value.dtype not in FLOAT_DTYPES:
        raise ValueError(f"{name} has dtype {value.dtype}; accepted are float32, float16, bfloat16 and float64.")


def require_latent(name: str, value: object) -> None:
    require_float_tensor(name, value)
    assert isinstance(value, Tensor)
    if value.dim() < 2:
        raise ValueError(f"{name} has shape {list(value.shape)}; accepted are a batch dimension and at least one more.")


def require_like_v(name: str, value: object, v: Tensor) -> None:
    require_float_tensor(name, value)
    assert isinstance(value, Tensor)
    if value.shape != v.shape:
        raise ValueError(f"{name} has shape {list(value.shape)}; accepted is the shape of v, {list(v.shape)}.")
    if value.device != v.device:
        raise ValueError(f"{name} is on {value.device}; accepted is the device of v, {v.device}.")


def require_per_sample(name: str, value: object, v: Tensor) -> None:
    require_float_tensor(name, value)
    assert isinstance(value, Tensor)
    if value.shape != v.shape[:1]:
        raise ValueError(f"{name} has shape {list(value.shape)}; accepted is one value a sample, [{v.shape[0]}].")
    if value.device != v.device:
        raise ValueError(f"{name} is on {value.device}; accepted is the device of v, {v.device}.")


def accumulate_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 as soon as one latent is float64, float32 otherwise: the type every sum is kept in."""
    wide = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


class Samples(NamedTuple):
    """What every forward-process loss knows of its samples, detached and in the accumulate dtype. All [B]."""

    t: Tensor
    advantages: Tensor  # of a reward-weighted loss: the rewards
    required: tuple[Tensor, ...]  # what else must be finite: t and whatever is given per sample
    valid_t: Tensor  # bool

    def usable_with(self, numbers: Numbers, *more: Tensor) -> Samples:
        """Without the samples that ``numbers`` leave without a meaning, and with ``more`` that must be finite."""
        t = numbers.contain(self.t)
        return self._replace(t=t, required=(t, *self.required[1:], *more))

    @property
    def finite(self) -> Tensor:
        return torch.isfinite(torch.stack([self.advantages, *self.required])).all(0)


class Quadratic(NamedTuple):
    """The weights of AdvantageFlow's three terms."""

    weights: Tensor  # [B, 3]: beta A, gamma, lam
    curvature: Tensor  # [B], their sum
    nonconvex: Tensor  # [B] bool
    unbounded: str  # what to say of nonconvex samples


WEIGHTINGS = ("prediction", "velocity", "adaptive")
NFT_MODES = ("all", "positive", "negative", "one", "binary")
AWM_WEIGHTINGS = ("uniform", "t", "t2", "huber", "ghuber", "adaptive")
REWARD_METHODS = ("exp", "linear", "best")
REDUCTIONS = ("mean", "sum", "none")
_MAY_BE_ABSENT = ("v_ema", "v_ref")


def advantage_flow_arguments(
    v: Tensor,
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    advantages: Tensor,
    v_old: Tensor,
    v_ref: Tensor | None,
    gamma: Number | str,
    lam: Number,
    beta: Number,
    weighting: str,
    reduction: str,
) -> tuple[Samples, Quadratic]:
    samples = _samples(v, t, "advantages", advantages, reduction, x0=x0, noise=noise, v_old=v_old, v_ref=v_ref)
    numbers = Numbers(v, samples.t.dtype)
    scale = numbers.read("beta", beta, low=0.0, exclusive=True)
    lams = numbers.weight_of("lam", lam, "v_ref", v_ref, default=1e-3)
    require_choice("weighting", weighting, WEIGHTINGS)
    A = samples.advantages
    accepted = 'number, a [B] tensor, a 0-dim tensor, "1-A" and "beta(beta-A)"'
    if isinstance(gamma, str):
        if gamma not in ("1-A", "beta(beta-A)"):
            raise ValueError(f"gamma is {gamma!r}; accepted are a {accepted}.")
        gammas = 1 - A if gamma == "1-A" else scale * (scale - A)
    elif isinstance(gamma, Tensor) or is_number(gamma, A.dtype):
        gammas = per_sample(numbers.read("gamma", gamma), A)
    else:
        raise ValueError(f"gamma is {gamma!r}; accepted are a finite {accepted}.")
    weights = torch.stack([scale * A, gammas, per_sample(lams, A)], 1)
    unbounded = (
        f"{{count}} sample(s) have {'A' if isinstance(scale, float) and scale == 1 else 'beta A'} + gamma + lam "
        "<= 0 (smallest {lowest:.6g}): their loss is unbounded below and pushes the policy away without limit. Use "
        "gamma above the largest |beta A| (1.1 for advantages clipped to [-1, 1] and beta = 1), "
        'gamma="1-A" or gamma="beta(beta-A)". Said once; metrics.nonconvex_samples keeps counting.'
    )
    curvature = weights.sum(1)
    nonconvex = curvature <= 0
    _warn_on_cpu(unbounded, curvature, nonconvex)
    samples = samples.usable_with(numbers, curvature)
    return samples, Quadratic(weights, curvature, nonconvex, unbounded)


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
) -> tuple[Samples, NftNumbers]:
    samples = _samples(v, t, "advantages", advantages, reduction, x0=x0, noise=noise, v_old=v_old, v_ref=v_ref)
    numbers = Numbers(v, samples.t.dtype)
    given = NftNumbers(
        numbers.read("beta", beta, low=0.0, exclusive=True),
        numbers.read("adv_clip_max", adv_clip_max, low=0.0, exclusive=True),
        numbers.weight_of("kl_weight", kl_weight, "v_ref", v_ref, default=1e-4),
        numbers.read("policy_weight", policy_weight, low=0.0),
    )
    require_flag("adaptive", adaptive)
    require_choice("mode", mode, NFT_MODES)
    return samples.usable_with(numbers), given


class AwmNumbers(NamedTuple):
    power: Number
    clip: ClipRange
    ema_weight: Number
    kl_weight: Number
    policy_weight: Number


def awm_arguments(
    v: Tensor,
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    advantages: Tensor,
    v_ema: Tensor | None,
    v_ref: Tensor | None,
    log_prob_old: Tensor | None,
    weighting: str,
    power: Number,
    draws: int,
    clip: Number | tuple[Number, Number],
    ema_weight: Number,
    kl_weight: Number,
    policy_weight: Number,
    reduction: str,
) -> tuple[Samples, AwmNumbers]:
    samples = _samples(v, t, "advantages", advantages, reduction, x0=x0, noise=noise, v_ema=v_ema, v_ref=v_ref)
    numbers = Numbers(v, samples.t.dtype)
    given = AwmNumbers(
        _awm_power(numbers, weighting, power),
        numbers.clip("clip", clip, exclusive=True),
        numbers.weight_of("ema_weight", ema_weight, "v_ema", v_ema, default=1.0),
        numbers.weight_of("kl_weight", kl_weight, "v_ref", v_ref, default=0.0),
        numbers.read("policy_weight", policy_weight, low=0.0),
    )
    samples = samples.usable_with(numbers)
    if log_prob_old is not None:
        require_per_sample("log_prob_old", log_prob_old, v)
        samples = samples.usable_with(numbers, constant(log_prob_old, samples.t.dtype))
    return _one_advantage_an_image(samples, draws), given


def awm_log_prob_arguments(
    v: Tensor, x0: Tensor, noise: Tensor, t: Tensor, weighting: str, power: Number
) -> tuple[Tensor, Number]:
    """t in the accumulate dtype, and the power."""
    dtype = _require_latents(v, x0=x0, noise=noise)
    numbers = Numbers(v, dtype)
    exponent = _awm_power(numbers, weighting, power)
    return numbers.contain(_timesteps(t, v, dtype)[0]), exponent


def _awm_power(numbers: Numbers, weighting: str, power: Number) -> Number:
    require_choice("weighting", weighting, AWM_WEIGHTINGS)
    return numbers.read("power", power, low=0.0, exclusive=True)


def _one_advantage_an_image(samples: Samples, draws: int) -> Samples:
    if isinstance(draws, bool) or not isinstance(draws, int) or draws < 1:
        raise ValueError(f"draws is {draws!r}; accepted is an integer of at least 1.")
    if draws == 1:
        return samples
    A = samples.advantages
    if A.shape[0] % draws:
        raise ValueError(f"advantages has shape {list(A.shape)}; accepted is [N*draws], a multiple of draws {draws}.")
    first = A[::draws].repeat_interleave(draws)
    other = A.isfinite() & first.isfinite() & (A != first)
    if values_are_at_hand(A) and other.any():
        row = int(other.nonzero()[0])
        raise ValueError(
            f"advantages[{row}] is {A[row].item():.6g} beside {first[row].item():.6g} of the same image; accepted is "
            f"one advantage for the {draws} consecutive draws of an image."
        )
    return samples._replace(advantages=torch.where(other, torch.nan, A))


def flow_awr_arguments(
    v: Tensor,
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    advantages: Tensor,
    v_old: Tensor,
    v_ref: Tensor | None,
    kl_weight: Number,
    policy_weight: Number,
    weighting: str,
    reduction: str,
) -> tuple[Samples, Number, Number]:
    """The samples, kl_weight and policy_weight."""
    samples = _samples(v, t, "advantages", advantages, reduction, x0=x0, noise=noise, v_old=v_old, v_ref=v_ref)
    require_choice("weighting", weighting, WEIGHTINGS)
    numbers = Numbers(v, samples.t.dtype)
    kl = numbers.weight_of("kl_weight", kl_weight, "v_ref", v_ref, default=0.0)
    policy = numbers.read("policy_weight", policy_weight, low=0.0)
    return samples.usable_with(numbers), kl, policy


class RewardNumbers(NamedTuple):
    tau: Number
    kl_weight: Number
    policy_weight: Number


def reward_weighted_arguments(
    v: Tensor,
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    rewards: Tensor,
    method: str,
    tau: Number,
    group_size: int | None,
    v_ref: Tensor | None,
    kl_weight: Number,
    policy_weight: Number,
    reduction: str,
) -> tuple[Samples, RewardNumbers, str]:
    """The samples, the numbers, and what to say where weight + kl_weight is negative."""
    samples = _samples(v, t, "rewards", rewards, reduction, x0=x0, noise=noise, v_ref=v_ref)
    numbers = Numbers(v, samples.t.dtype)
    require_choice("method", method, REWARD_METHODS)
    given = RewardNumbers(
        numbers.read("tau", tau, low=0.0, exclusive=True),
        numbers.weight_of("kl_weight", kl_weight, "v_ref", v_ref, default=1.0),
        numbers.read("policy_weight", policy_weight, low=0.0),
    )
    if method == "best" or group_size is not None:
        require_group_size(group_size, rewards)
    unbounded = (
        "{count} sample(s) have reward + kl_weight < 0 (smallest {lowest:.6g}): their loss is unbounded below and "
        'pushes the policy away without limit. Use rewards of at least 0, or method="exp". Said once; '
        "metrics.nonconvex_samples keeps counting."
    )
    if method == "linear":
        curvature = given.policy_weight * samples.advantages + given.kl_weight
        _warn_on_cpu(unbounded, curvature, curvature < 0)
    return samples.usable_with(numbers), given, unbounded


def require_native_dtype(dtype: torch.dtype, v: Tensor, op: str) -> None:
    """Refuses what the native core does not take and the reference does."""
    if dtype == torch.float64 and v.is_cuda:
        raise ValueError(
            "a latent is float64 on CUDA; accepted there are float32, float16 and bfloat16 (float64 is served on CPU, "
            f"and everywhere by advflow_ext.reference.{op})."
        )


def _samples(v: Tensor, t: Tensor, name: str, advantages: Tensor, reduction: str, **latents: Tensor | None) -> Samples:
    dtype = _require_latents(v, **latents)
    require_per_sample(name, advantages, v)
    require_choice("reduction", reduction, REDUCTIONS)
    t, valid_t = _timesteps(t, v, dtype)
    advantages = constant(advantages, dtype)
    return Samples(t, advantages, (t,), valid_t)


def _require_latents(v: Tensor, **latents: Tensor | None) -> torch.dtype:
    """The accumulate dtype of latents that fit together."""
    require_latent("v", v)
    for name, latent in latents.items():
        if latent is not None or name not in _MAY_BE_ABSENT:
            require_like_v(name, latent, v)
    return accumulate_dtype(v, *latents.values())


def _timesteps(t: Tensor, v: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """t in ``dtype``, and where it lies in (0, 1]."""
    require_per_sample("t", t, v)
    t = constant(t, dtype)
    valid = (t > 0) & (t <= 1)
    # A t that is not finite is a damaged sample rather than a wrong argument: dropped and counted everywhere.
    if values_are_at_hand(t) and not valid.all() and (wrong := t.isfinite() & ~valid).any():
        first = int(wrong.nonzero()[0])
        raise ValueError(
            f"t[{first}] is {t[first].item():.6g}; accepted is 0 < t <= 1 (t = 0 is data, t = 1 is noise)."
        )
    return t, valid


def _warn_on_cpu(message: str, curvature: Tensor, nonconvex: Tensor) -> None:
    if not values_are_at_hand(curvature) or not nonconvex.any():
        return
    below = curvature[nonconvex & curvature.isfinite()]
    if below.numel():
        warn_nonconvex(message, below.numel(), float(below.min()), stacklevel=5)  # the caller of the loss
