"""Rewards of image groups turned into advantages (AdvantageFlow, arXiv 2605.26013, eq. 6, and its relatives)."""

from __future__ import annotations

import torch
from torch import Tensor

from advflow_ext.contract.checks import require_choice, require_flag, require_group_size
from advflow_ext.contract.numbers import Number, Numbers

_DEFAULT_EPS = {"batch_rms": 1e-8, "group_std": 1e-4, "raw_global_std": 1e-4}
HEADROOM = 2.0**-10  # a power of two: sums and differences of rewards near the largest number do not overflow
_CLIP_MODES = ("clip", "recentre", "scale", "clip_divide", "tanh")


@torch.no_grad()
def group_advantages(
    rewards: Tensor,
    group_size: int,
    *,
    norm: str = "batch_rms",
    clip: Number | None = 1.0,
    clip_mode: str = "clip",
    eps: Number | None = None,
    ddof: int = 0,
) -> Tensor:
    """Advantages ``[L*K]`` of rewards ``[L*K]``: L prompts with K = ``group_size`` images each, images of a prompt
    consecutive. Pass the whole logical batch, never one device's shard of it.

    Each reward is centred by its group's mean, r - mean_k r, then divided:

    * ``norm="batch_rms"`` (AdvantageFlow, eq. 6): by max(Z, eps), Z the root mean square of the centred rewards over
      the whole batch. eps defaults to 1e-8.
    * ``norm="group_std"`` (Flow-GRPO): by the group's own standard deviation + eps; eps defaults to 1e-4.
    * ``norm="raw_global_std"`` (NVlabs DiffusionNFT): by the standard deviation of the raw rewards of the whole batch,
      which includes the spread between prompts, + eps; eps defaults to 1e-4.

    ``clip`` and ``eps`` are numbers or 0-dim tensors. ``ddof`` is subtracted from the number of values in the mean of
    squares (0 in all three sources).

    The result is bounded by ``clip`` (``None``: unbounded) in one of five ways:

    * ``clip_mode="clip"`` (eq. 6): clamp to [-clip, clip]. Groups no longer sum to zero.
    * ``"recentre"``: clamp, then subtract each group's mean again. Sums to zero; may exceed the bound slightly.
    * ``"scale"``: a group that exceeds the bound is scaled down to it as a whole. Sums to zero.
    * ``"clip_divide"``: clamp, then divide by ``clip`` (DiffusionNFT: clip 5, divide by 5).
    * ``"tanh"``: clip tanh(A / clip) (V-GRPO, arXiv 2604.23380, with clip 3).

    An image whose reward is not finite gets advantage 0 and counts in no mean or deviation. Equal rewards give zeros.
    Any real dtype is accepted; the arithmetic is float64; the result is float64 for float64 rewards, else float32.

    Raises ValueError for rewards that are not ``[L*K]``, group_size below 2, unknown names, clip or eps out of range.
    """
    bound, eps = _check_arguments(rewards, group_size, norm, clip, clip_mode, eps, ddof)
    floor = (_DEFAULT_EPS[norm] if eps is None else eps) * HEADROOM

    raw, centred, finite = groups_of(rewards, group_size)

    if norm == "batch_rms":
        scale = _rms(centred, finite, ddof, over_batch=True).clamp(min=floor)
    elif norm == "group_std":
        scale = _rms(centred, finite, ddof, over_batch=False) + floor
    else:
        scale = _raw_std(raw, finite, ddof) + floor
    advantages = torch.where(centred == 0, 0, centred / scale)

    if bound is not None:
        advantages = _bound(advantages, finite, bound, clip_mode)
    return advantages.flatten().to(torch.float64 if rewards.dtype == torch.float64 else torch.float32)


@torch.no_grad()
def softmax_advantages(
    rewards: Tensor,
    group_size: int,
    *,
    norm: str = "raw_global_std",
    temperature: Number = 1.0,
    clip_rewards: Number | None = 5.0,
    clip: Number | None = 3.0,
    scale_by_std: bool = False,
    eps: Number = 1e-4,
) -> Tensor:
    """FlowAWR's advantages ``[L*K]`` of rewards ``[L*K]``, K = ``group_size`` consecutive images a prompt, as coded in
    Fuzm7/FlowAWR @05e993a (its "energies"). Pass the whole logical batch, never one device's shard of it::

        z = clip((r - mean_k r) / (std + eps), +-clip_rewards),   p = softmax_k(z / temperature)
        A = clip(K (p - 1/K), +-clip)                                              the default
        A = clip((p - 1/K) / max(std_k(p - 1/K) + 1e-4, 0.01), +-clip)             scale_by_std=True

    ``scale_by_std`` is the released code's gate for rule-based rewards (``hard_gating``, on for GenEval and OCR):
    groups that differ count alike, equal ones not at all. Before the last clip the mean of a group is 0.

    ``norm`` says which deviation: of the raw rewards of the whole batch ("raw_global_std", the released
    configurations), of the group's ("group_std"), or none at all ("none": rewards are centred alone). ``None`` for a
    clip is no clip. The paper's eq. 11 (arXiv 2606.30376, as restated publicly), K softmax_k(r / g) - 1 in [-1, K-1],
    is ``clip_rewards=None, clip=None`` with ``eps=0`` where g is the deviation of the batch, or with ``norm="none",
    temperature=g`` for a number g.

    Non-finite rewards, equal rewards, dtypes and precision: as in :func:`group_advantages`; K counts finite rewards.

    Raises ValueError for rewards that are not ``[L*K]``, group_size below 2, an unknown norm, and numbers out of range.
    """
    check_rewards(rewards, group_size)
    require_choice("norm", norm, ("raw_global_std", "group_std", "none"))
    numbers = Numbers(rewards, torch.float64, per_sample=False)
    temperature = numbers.read("temperature", temperature, low=0.0, exclusive=True)
    if clip_rewards is not None:
        clip_rewards = numbers.read("clip_rewards", clip_rewards, low=0.0, exclusive=True)
    if clip is not None:
        clip = numbers.read("clip", clip, low=0.0, exclusive=True)
    require_flag("scale_by_std", scale_by_std)
    floor = numbers.read("eps", eps, low=0.0) * HEADROOM

    raw, centred, finite = groups_of(rewards, group_size)
    scaled = centred / HEADROOM
    if norm != "none":
        std = _raw_std(raw, finite, 0) if norm == "raw_global_std" else _rms(centred, finite, 0, over_batch=False)
        scaled = torch.where(centred == 0, 0, centred / (std + floor))
    if clip_rewards is not None:
        scaled = clamped(scaled, clip_rewards)

    largest = torch.where(finite, scaled, -torch.inf).amax(1, keepdim=True)
    weights = torch.where(finite, ((scaled - largest) / temperature).exp(), 0)
    count = finite.sum(1, keepdim=True, dtype=raw.dtype)
    # In this order equal rewards give exact zeros.
    advantages = torch.where(finite, weights / weights.sum(1, keepdim=True) - 1 / count, 0)
    if scale_by_std:
        std = _rms(advantages, finite, 0, over_batch=False)  # their mean is 0
        advantages = advantages / (std + 1e-4).clamp(min=1e-2)
    else:
        advantages = advantages * count
    if clip is not None:
        advantages = clamped(advantages, clip)
    return advantages.flatten().to(torch.float64 if rewards.dtype == torch.float64 else torch.float32)


def groups_of(rewards: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The rewards, the same centred in their groups, and which are finite (the others are 0 in both). All [L, K].

    Both times :data:`HEADROOM`.
    """
    raw = rewards.detach().double().view(-1, group_size) * HEADROOM
    finite = raw.isfinite()
    raw = torch.where(finite, raw, 0)
    # Measured from a member of the group, equal rewards centre to exact zeros, which the mean's rounding would spoil.
    origin = torch.where(finite, raw, torch.inf).amin(1, keepdim=True)
    return raw, _centre(torch.where(finite, raw - origin, 0), finite), finite


def _centre(values: Tensor, finite: Tensor) -> Tensor:
    mean = values.sum(1, keepdim=True) / finite.sum(1, keepdim=True).clamp(min=1)
    return torch.where(finite, values - mean, 0)


def _rms(centred: Tensor, finite: Tensor, ddof: int, *, over_batch: bool) -> Tensor:
    values, counted = (centred.view(1, -1), finite.view(1, -1)) if over_batch else (centred, finite)
    if not values.numel():
        return values.new_zeros(())
    # Over a power of two, which leaves every digit as it is, squares neither overflow nor vanish.
    largest = values.abs().amax(1, keepdim=True)
    scale = torch.where(largest > 0, largest / torch.frexp(largest).mantissa, 1)
    squares, count = (values / scale).square().sum(1, keepdim=True), counted.sum(1, keepdim=True)
    return (squares / (count - ddof).clamp(min=1)).sqrt() * scale


def _raw_std(raw: Tensor, finite: Tensor, ddof: int) -> Tensor:
    lowest = torch.where(finite, raw, torch.inf).amin() if raw.numel() else raw.sum()
    shifted = torch.where(finite, raw - lowest, 0)
    mean = shifted.sum() / finite.sum().clamp(min=1)
    return _rms(torch.where(finite, shifted - mean, 0), finite, ddof, over_batch=True)


def _bound(advantages: Tensor, finite: Tensor, clip: Number, mode: str) -> Tensor:
    if mode == "tanh":
        return clip * (advantages / clip).tanh()
    if mode == "scale":
        largest = advantages.abs().amax(1, keepdim=True)
        return advantages * torch.where(largest > clip, clip / largest, 1)
    clipped = clamped(advantages, clip)
    if mode == "recentre":
        return _centre(clipped, finite)
    return clipped / clip if mode == "clip_divide" else clipped


def clamped(values: Tensor, bound: Number) -> Tensor:
    return torch.clamp(values, -bound, bound)  # type: ignore[arg-type]  # two numbers or two tensors


def _check_arguments(
    rewards: Tensor, group_size: int, norm: str, clip: Number | None, clip_mode: str, eps: Number | None, ddof: int
) -> tuple[Number | None, Number | None]:
    """clip and eps, ready to compute with."""
    check_rewards(rewards, group_size)
    require_choice("norm", norm, tuple(_DEFAULT_EPS))
    require_choice("clip_mode", clip_mode, _CLIP_MODES)
    numbers = Numbers(rewards, torch.float64, per_sample=False)
    if clip is not None:
        clip = numbers.read("clip", clip, low=0.0, exclusive=True)
    if eps is not None:
        eps = numbers.read("eps", eps, low=0.0)
    if isinstance(ddof, bool) or not isinstance(ddof, int) or ddof < 0:
        raise ValueError(f"ddof is {ddof!r}; accepted is an integer of at least 0.")
    return clip, eps


def check_rewards(rewards: Tensor, group_size: int) -> None:
    if not isinstance(rewards, Tensor) or rewards.is_complex():
        kind = rewards.dtype if isinstance(rewards, Tensor) else type(rewards).__name__
        raise ValueError(f"rewards is {kind}; accepted is a real torch.Tensor of shape [L*K].")
    require_group_size(group_size, rewards)
