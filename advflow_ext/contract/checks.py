"""Argument checks shared by every implementation of a loss, so that native and reference refuse the same calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from advflow_ext.contract.numbers import (
    Numbers,
    constant,
    values_are_at_hand,
)
from advflow_ext.contract.outputs import warn_nonconvex

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def require_choice(name: str, value: object, accepted: Sequence[str]) -> None:
    if value not in accepted:
        listed = ", ".join(repr(choice) for choice in accepted)
        raise ValueError(f"{name} is {value!r}; accepted are {listed}.")


def spelled(value: object, spellings: Mapping[str, str]) -> Any:
    """``value``, by the name it has here where a trainer has another."""
    return spellings.get(value, value) if isinstance(value, str) else value


def require_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}; accepted are True and False.")


def require_count(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} is {value!r}; accepted is an integer of at least {least}.")


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
    require_like("v", name, value, v)


def require_like(first: str, name: str, value: object, like: Tensor) -> None:
    require_float_tensor(name, value)
    assert isinstance(value, Tensor)
    if value.shape != like.shape:
        raise ValueError(f"{name} has shape {list(value.shape)}; accepted is the shape of {first}, {list(like.shape)}.")
    if value.device != like.device:
        raise ValueError(f"{name} is on {value.device}; accepted is the device of {first}, {like.device}.")


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


WEIGHTINGS = ("prediction", "velocity", "adaptive")
REDUCTIONS = ("mean", "sum", "none")
_MAY_BE_ABSENT = ("v_ema", "v_ref")


def require_native_dtype(dtype: torch.dtype, v: Tensor, op: str) -> None:
    """Refuses what the native core does not take and the reference does."""
    if dtype == torch.float64 and v.is_cuda:
        raise ValueError(
            "a latent is float64 on CUDA; accepted there are float32, float16 and bfloat16 (float64 is served on CPU, "
            f"and everywhere by advflow_ext.reference.{op})."
        )


def require_samples(
    v: Tensor, t: Tensor, name: str, advantages: Tensor, reduction: str, **latents: Tensor | None
) -> torch.dtype:
    """The accumulate dtype of what every forward-process loss is called with."""
    dtype = require_latents(v, **latents)
    require_per_sample(name, advantages, v)
    require_choice("reduction", reduction, REDUCTIONS)
    require_timesteps(t, v, dtype)
    return dtype


def samples_of(
    v: Tensor, t: Tensor, name: str, advantages: Tensor, reduction: str, **latents: Tensor | None
) -> Samples:
    return samples_in(require_samples(v, t, name, advantages, reduction, **latents), t, advantages)


def samples_in(dtype: torch.dtype, t: Tensor, advantages: Tensor) -> Samples:
    t = constant(t, dtype)
    return Samples(t, constant(advantages, dtype), (t,), (t > 0) & (t <= 1))


def require_latents(v: Tensor, **latents: Tensor | None) -> torch.dtype:
    """The accumulate dtype of latents that fit together."""
    require_latent("v", v)
    for name, latent in latents.items():
        if latent is not None or name not in _MAY_BE_ABSENT:
            require_like_v(name, latent, v)
    return accumulate_dtype(v, *latents.values())


def require_timesteps(t: Tensor, v: Tensor, dtype: torch.dtype) -> None:
    require_per_sample("t", t, v)
    if not values_are_at_hand(t) or not t.numel():
        return
    times = t.detach().to(dtype)
    lowest, highest = times.aminmax()
    if lowest.item() > 0 and highest.item() <= 1:
        return
    # A t that is not finite is a damaged sample rather than a wrong argument: dropped and counted everywhere.
    wrong = times.isfinite() & ~((times > 0) & (times <= 1))
    if wrong.any():
        first = int(wrong.nonzero()[0])
        raise ValueError(
            f"t[{first}] is {times[first].item():.6g}; accepted is 0 < t <= 1 (t = 0 is data, t = 1 is noise)."
        )


def warn_on_cpu(message: str, curvature: Tensor, nonconvex: Tensor) -> None:
    if not values_are_at_hand(curvature) or not nonconvex.any():
        return
    below = curvature[nonconvex & curvature.isfinite()]
    if below.numel():
        warn_nonconvex(message, below.numel(), float(below.min()), stacklevel=5)  # the caller of the loss
