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

    difference = log_prob - entering(given.log_prob_old)
    log_ratio = at_level(difference)
    bounds = Bounds.of(given.clip, advantages[0, :, 0])
    policy = surrogate(log_ratio, advantages, bounds, given.surrogate, given.dtype)
    policy_term = (policy.terms.sum(0) * shares).sum(1)
    overflows = policy.overflows.any(0)
    # At most how steep the loss is in a log-probability, and in what else of a token the gradient of logits is made of.
    steep, steeper = policy.slopes.sum(0), 2 * entropy_weight * entropy.detach().amax(1)

    kl = torch.zeros_like(policy_term)
    if found.kl is not None:
        of_token = entering(found.kl)
        kl = (of_token * share).sum(1)
        steeper = steeper + kl_weight * (2 * of_token + (2 * of_token.clamp(min=0)).sqrt()).detach().amax(1)
    elif given.log_prob_ref is not None:
        beyond = at_level(entering(given.log_prob_ref) - log_prob)
        too_far = beyond.detach() > _log_most(given.dtype)
        beyond = torch.where(too_far, 0, beyond)
        kl = ((beyond.expm1() - beyond) * shares).sum(1)
        steep = steep + kl_weight[:, None] * (1 + beyond.detach().exp())
        overflows = overflows | (too_far & (kl_weight != 0)[:, None])

    mean_entropy = (entropy * share).sum(1)
    # A weight that is 0 for sure costs no backward pass.
    pulled = kl if _may_count(given.kl_weight) else kl.detach()
    spread = mean_entropy if _may_count(given.entropy_weight) else mean_entropy.detach()
    losses = policy_term + kl_weight * pulled - entropy_weight * spread
    with torch.no_grad():
        finite = clean & ~overflows.any(1) & (losses.abs() <= torch.finfo(given.dtype).max)
        finite &= _gradient_fits(2 * steep.amax(1) + steeper, reach, given.guidance)
    losses = torch.where(finite & given.valid, losses, 0)
    of_advantages = advantages.sum(0)[:, 0]
    columns = [losses, policy_term, mean_entropy, (difference * share).sum(1), kl, of_advantages, of_advantages.abs()]
    metrics = _metrics(torch.stack(columns), log_ratio, shares, bounds, policy.clipped, finite, given.valid)
    loss = reduce_losses(losses, given.reduction).to(given.dtype)
    return LossOutput(loss, LossMetrics(metrics.to(given.dtype), TOKEN_METRICS))


@torch.no_grad()
def _metrics(
    means: Tensor,  # [7, B]
    log_ratio: Tensor,  # [B, L]
    shares: Tensor,  # [B, L]
    bounds: Bounds,
    clipped: Tensor,  # [A, B, L] bool
    finite: Tensor,  # [B] bool
    valid: Tensor,  # [B] bool
) -> Tensor:
    """In the order of :data:`advflow_ext.contract.outputs.TOKEN_METRICS`."""
    usable = finite & valid
    of_batch = usable.double() / usable.sum().clamp(min=1)
    counted = usable[:, None] & (shares > 0)
    largest = torch.cat([torch.where(counted, log_ratio, 0).abs().flatten(), of_batch.new_zeros(1)]).amax(0)
    of_clip = (clipped.double().mean(0) * shares).sum(1) @ of_batch
    counts = torch.stack([~finite & valid, ~valid]).sum(1, dtype=of_batch.dtype)
    limits = (bound.expand_as(log_ratio).flatten() for bound in (bounds.log_lowest, bounds.log_highest))
    ratio = Ratio(log_ratio.flatten(), *limits)
    of_ratios = of_ratio(ratio, counted.flatten(), (of_batch[:, None] * shares).flatten())
    means = torch.where(usable, means, 0) @ of_batch
    return torch.cat([means, largest[None], of_clip[None], counts, of_ratios])


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
