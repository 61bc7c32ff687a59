"""Drawing image tokens, and scoring them under the policy that drew them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from advflow.autoregressive.token_model import Condition, Hidden, Text, TokenModel


class Samples(NamedTuple):
    """Tokens [B, T] and the log-probability of each under the policy, fp32 [B, T]."""

    tokens: Tensor
    log_probs: Tensor


def draws(generators: Sequence[torch.Generator], tokens: int) -> Tensor:
    """One number in [0, 1) for each token of an image, fp64 [B, T], a row from each generator."""
    return torch.stack([torch.rand(tokens, generator=each, dtype=torch.float64) for each in generators])


@torch.no_grad()
def sample(
    model: TokenModel,
    condition: Condition,
    uniforms: Tensor,
    *,
    guidance: float = 1.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Samples:
    """Draws an image's tokens for each row of `condition`, the t-th by the t-th number of its row of `uniforms`.

    So a row's tokens do not depend on what else is in the batch, beyond rounding. With a `guidance` other than 1 the
    policy is that of `policy_states`, at two forwards a token. `log_probs` are of the whole policy, as the loss has
    them, `top_k` and `top_p` or not: to learn from images leave those two as they are.

    Raises ValueError for numbers outside of what they can be.
    """
    if temperature <= 0:
        raise ValueError(
            f"temperature is {temperature}; accepted: a positive number (top_k=1 always takes the likeliest)"
        )
    if top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(f"top_k is {top_k}, top_p {top_p}; accepted: top_k of 0 (all) or more, top_p in (0, 1]")
    if uniforms.shape != (len(_first(condition)), model.tokens):
        raise ValueError(
            f"uniforms has shape {list(uniforms.shape)}; accepted: a row of {model.tokens} for each of "
            f"{len(_first(condition))} conditions"
        )
    guided = guidance != 1.0
    if guided:
        condition = joined(condition, model.unconditional(condition))
    uniforms = uniforms.to(_first(condition).device)
    states, cache, visible = model.start(condition)
    tokens: list[Tensor] = []
    log_probs: list[Tensor] = []
    for step in range(model.tokens):
        if step:
            last = tokens[-1]
            states = model.advance(torch.cat([last, last]) if guided else last, cache, visible)
        mixed = guide(states, guidance) if guided else states
        scores = torch.nn.functional.linear(mixed / temperature, model.head_weight).float().log_softmax(1)
        tokens.append(_choose(_truncated(scores, top_k, top_p), uniforms[:, step]))
        log_probs.append(scores.gather(1, tokens[-1][:, None])[:, 0])
    return Samples(torch.stack(tokens, 1), torch.stack(log_probs, 1))


def policy_states(
    model: Callable[[Condition, Tensor], Hidden],
    condition: Condition,
    tokens: Tensor,
    unconditional: Condition | None = None,
    *,
    guidance: float = 1.0,
    temperature: float = 1.0,
) -> Hidden:
    """States of the policy that draws `tokens` at this guidance and temperature: softmax(states @ head.T).

    `model` may be wrapped, in DistributedDataParallel say: it is called once. `unconditional`, the model's own, is
    needed for a guidance other than 1. Guidance mixes hidden states, which is mixing logits since the head is linear.
    """
    if guidance == 1.0:
        states, head = model(condition, tokens)
        return Hidden(states / temperature, head)
    if unconditional is None:
        raise ValueError(f"guidance is {guidance} without an unconditional; accepted: model.unconditional(condition)")
    states, head = model(joined(condition, unconditional), torch.cat([tokens, tokens]))
    return Hidden(guide(states, guidance) / temperature, head)


def guide(states: Tensor, guidance: float) -> Tensor:
    """Of the states with a condition, then those without, one row after another."""
    conditional, unconditional = states.chunk(2)
    return unconditional + guidance * (conditional - unconditional)


def joined(first: Condition, second: Condition) -> Condition:
    if isinstance(first, Text) and isinstance(second, Text):
        return Text(torch.cat([first.features, second.features]), torch.cat([first.words, second.words]))
    assert isinstance(first, Tensor) and isinstance(second, Tensor)
    return torch.cat([first, second])


def _first(condition: Condition) -> Tensor:
    return condition.features if isinstance(condition, Text) else condition


def _truncated(scores: Tensor, top_k: int, top_p: float) -> Tensor:
    """Log-probabilities of which only the `top_k` likeliest, and those before `top_p` is passed, are left."""
    if 0 < top_k < scores.shape[1]:
        scores = scores.masked_fill(scores < scores.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        ordered, index = scores.sort(descending=True)
        ahead = ordered.softmax(1).cumsum(1)
        beyond = torch.zeros_like(ahead, dtype=torch.bool)
        beyond[:, 1:] = ahead[:, :-1] > top_p  # the one that passes it still counts
        scores = scores.masked_fill(torch.zeros_like(beyond).scatter(1, index, beyond), -torch.inf)
    return scores


def _choose(scores: Tensor, uniform: Tensor) -> Tensor:
    """The token at which the cumulated probability passes `uniform` [B]."""
    reached = scores.double().softmax(1).cumsum(1)
    # Of the sum itself, which may be a rounding short of 1.
    at = torch.searchsorted(reached, uniform[:, None] * reached[:, -1:], right=True)
    return at[:, 0].clamp(max=scores.shape[1] - 1)
