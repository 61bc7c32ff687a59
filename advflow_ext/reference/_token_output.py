"""What ends a loss of token sequences: ratios, the clip, the reference term, entropy and metrics, in plain PyTorch.

A few numbers a token, [B, T]: in float64, since a log-ratio is the small difference of two log-probabilities.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from advflow_ext.contract.numbers import ClipRange, Number, per_sample
from advflow_ext.contract.outputs import TOKEN_METRICS, LossMetrics, LossOutput, Ratio
from advflow_ext.reference._summary import of_ratio, reduce_losses


class TokenPolicyArguments(NamedTuple):
    """What a call of :func:`advflow_ext.token_policy_loss` says beside its hidden states and heads."""

    tokens: Tensor  # [B, T] int64, each in the vocabulary
    live: Tensor  # [B, T] bool: tokens that count
    valid: Tensor  # [B] bool
    log_prob_old: Tensor  # [B, T] float64
    log_prob_ref: Tensor | None  # [B, T] float64
    advantages: Tensor  # [A, B] float64
    clip: ClipRange
    kl_weight: Number
    entropy_weight: Number
    guidance: Number
    level: str
    surrogate: str
    reduction: str
    dtype: torch.dtype  # of what is accumulated, and of the result


class TokenStatistics(NamedTuple):
    """Of each token's distribution, ``[B, T]``, with gradients to hidden states and head."""

    log_prob: Tensor  # of the token
    entropy: Tensor
    kl: Tensor | None  # to the reference's distribution, over the whole vocabulary


class Reach(NamedTuple):
    """What bounds a gradient: the largest magnitudes of what it is made of, and the dtypes it is returned in."""

    hidden: Tensor  # [B] float64
    weight: Tensor  # [] float64
    hidden_dtype: torch.dtype
    weight_dtype: torch.dtype


def reach_of(mixed: Tensor, hidden: Tensor, weight: Tensor, live: Tensor) -> Reach:
    """``mixed``: the hidden states that meet the head, ``hidden`` as they were given."""
    with torch.no_grad():
        of_tokens = torch.maximum(mixed.amax(-1), -mixed.amin(-1)).double()
        of_hidden = torch.where(live, of_tokens, 0).amax(1)
        lowest, highest = weight.aminmax()
        of_weight = torch.maximum(highest, -lowest).double()
    return Reach(of_hidden, of_weight, hidden.dtype, weight.dtype)


def token_policy_output(given: TokenPolicyArguments, found: TokenStatistics, reach: Reach) -> LossOutput:
    live = given.live & given.valid[:, None]
    share = live.double() / live.sum(1, keepdim=True).clamp(min=1)  # of a token in its sequence

    kl_weight, entropy_weight = (
        per_sample(number, given.advantages[0]) for number in (given.kl_weight, given.entropy_weight)
    )
    with torch.no_grad():
        numbers = [*found, given.log_prob_old, given.log_prob_ref]
        whole = torch.stack([torch.isfinite(each) for each in numbers if each is not None]).all(0)
        of_sequence = torch.isfinite(torch.stack([*given.advantages, kl_weight, entropy_weight])).all(0)
        clean = (whole | ~live).all(1) & of_sequence

    # The mask sits at the entrance: the backward of `where` writes exact zeros there, whatever NaN arises behind it.
    def entering(numbers: Tensor) -> Tensor:
        return torch.where(live & clean[:, None], numbers, 0).double()

    log_prob, entropy = entering(found.log_prob), entering(found.entropy)
    advantages = torch.where(clean, given.advantages, 0)[:, :, None]  # [A, B, 1]
    kl_weight, entropy_weight = (torch.where(clean, each, 0) for each in (kl_weight, entropy_weight))

    # What the ratio is of: [B, 1] for a sequence, [B, T] for tokens, and how much each of them counts.
    of_tokens = given.level == "token"
    shares = share if of_tokens else torch.ones_like(share[:, :1])

    def at_level(numbers: Tensor) -> Tensor:
        return numbers if of_tokens else (numbers * share).sum(1, keepdim=True)

    log_ratio = at_level(log_prob - entering(given.log_prob_old))
    bounds = Bounds.of(given.clip, advantages[0, :, 0])
    policy = surrogate(log_ratio, advantages, bounds, given.surrogate, given.dtype)
    policy_term = (policy.terms.sum(0) * shares).sum(1)
    steepest = policy.slopes.sum(0)  # of any log-probability, and below of the other terms
    overflows = policy.overflows.any(0)

    kl, of_kl = torch.zeros_like(policy_term), torch.zeros_like(policy_term)
    if found.kl is not None:
        each = entering(found.kl)
        kl = (each * share).sum(1)
        of_kl = (2 * each + (2 * each.clamp(min=0)).sqrt()).detach().amax(1)
    elif given.log_prob_ref is not None:
        difference = at_level(entering(given.log_prob_ref) - log_prob)
        too_far = difference.detach() > _log_most(given.dtype)
        difference = torch.where(too_far, 0, difference)
        kl = ((difference.expm1() - difference) * shares).sum(1)
        steepest = steepest + kl_weight[:, None] * (1 + difference.detach().exp())
        overflows = overflows | (too_far & (kl_weight != 0)[:, None])

    mean_entropy = (entropy * share).sum(1)
    # A weight that is 0 for sure costs no backward pass.
    pulled = kl if _may_count(given.kl_weight) else kl.detach()
    spread = mean_entropy if _may_count(given.entropy_weight) else mean_entropy.detach()
    losses = policy_term + kl_weight * pulled - entropy_weight * spread
    with torch.no_grad():
        finite = clean & ~overflows.any(1) & (losses.abs() <= torch.finfo(given.dtype).max)
        total = 2 * steepest.amax(1) + 2 * entropy_weight * entropy.amax(1) + kl_weight * of_kl
        finite &= _gradient_fits(total, reach, given.guidance)
    losses = torch.where(finite & given.valid, losses, 0)

    with torch.no_grad():
        usable = finite & given.valid
        weight = usable.double() / usable.sum().clamp(min=1)
        of_advantage = advantages.sum(0)[:, 0]
        columns = [losses, policy_term, mean_entropy, ((log_prob - entering(given.log_prob_old)) * share).sum(1), kl]
        means = torch.stack([*columns, of_advantage, of_advantage.abs()])
        means = torch.where(usable, means, 0) @ weight
        counted = (usable[:, None] & (shares > 0)).flatten()
        ratio = Ratio(log_ratio.detach().flatten(), *(each.expand_as(log_ratio).flatten() for each in bounds[:2]))
        largest = torch.cat([torch.where(counted, ratio.log_ratio, 0).abs(), weight.new_zeros(1)]).amax(0, keepdim=True)
        clipped = ((policy.clipped.double().mean(0) * shares).sum(1) @ weight)[None]
        counts = torch.stack([~finite & given.valid, ~given.valid]).sum(1, dtype=means.dtype)
        of_ratios = of_ratio(ratio, counted, (weight[:, None] * shares).flatten())
        metrics = torch.cat([means, largest, clipped, counts, of_ratios]).to(given.dtype)
    loss = reduce_losses(losses, given.reduction).to(given.dtype)
    return LossOutput(loss, LossMetrics(metrics, TOKEN_METRICS))


class Bounds(NamedTuple):
    """A clip range, ``[B, 1]``: its logarithms first, where float64 still tells a narrow one from none."""

    log_lowest: Tensor
    log_highest: Tensor
    lowest: Tensor
    highest: Tensor

    @classmethod
    def of(cls, clip: ClipRange, like: Tensor) -> Bounds:
        numbers = (clip.log_lowest, clip.log_highest, 1 - clip.below, 1 + clip.above)
        return cls(*(per_sample(number, like)[:, None] for number in numbers))


class Surrogate(NamedTuple):
    """``[A, B, L]`` each: of every advantage and ratio."""

    terms: Tensor
    clipped: Tensor  # bool: the clip leaves no gradient
    slopes: Tensor  # magnitude of d term / d log-ratio
    overflows: Tensor  # bool: not clipped, and no number one can compute with


def surrogate(log_ratio: Tensor, advantages: Tensor, bounds: Bounds, form: str, dtype: torch.dtype) -> Surrogate:
    """PPO's larger, or the released trainer's smaller, of -A r and -A clip(r).

    Decided on the log-ratio, so that a ratio which overflows is clipped like any other.
    """
    above, below = log_ratio.detach() > bounds.log_highest, log_ratio.detach() < bounds.log_lowest
    rising, falling = (advantages > 0, advantages < 0) if form == "ppo" else (advantages < 0, advantages > 0)
    clipped = (above & rising) | (below & falling)
    free = ~clipped & (advantages != 0)
    overflows = free & (log_ratio.detach() > _log_most(dtype))
    # Selecting after the exponential is too late: its backward would still multiply 0 by infinity.
    ratio = torch.where(free & ~overflows, log_ratio, 0).exp()
    terms = -advantages * torch.where(clipped, torch.where(above, bounds.highest, bounds.lowest), ratio)
    slopes = torch.where(free & ~overflows, advantages.abs() * ratio.detach(), 0)
    return Surrogate(terms, clipped, slopes, overflows)


def _may_count(weight: Number) -> bool:
    return isinstance(weight, Tensor) or weight != 0


def _log_most(dtype: torch.dtype) -> float:
    return math.log(torch.finfo(dtype).max)


def _gradient_fits(total: Tensor, reach: Reach, guidance: Number) -> Tensor:
    """``[B]``: whether no element of a gradient can overflow its dtype, from sum_v |dz_v| <= total of each token."""
    factor = per_sample(guidance, total).abs()
    factor = torch.maximum(factor, (1 - per_sample(guidance, total)).abs())
    fits: Tensor = total * reach.weight * factor <= torch.finfo(reach.hidden_dtype).max
    return fits & (total * reach.hidden <= torch.finfo(reach.weight_dtype).max)
