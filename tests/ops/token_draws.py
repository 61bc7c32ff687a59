"""Sequences of tokens for the tests beside this file, and their loss as one would write it down: all logits at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import advflow_ext as af

LEAVES = ("hidden", "weight", "hidden_uncond")
Call = dict[str, Any]


def draw(
    batch: int = 3,
    tokens: int = 5,
    width: int = 8,
    vocabulary: int = 19,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    guided: bool = False,
    reference: bool = True,
    several: bool = True,
) -> Call:
    """Arguments of a call whose ratios are a few per cent from 1; leaves ask for gradients."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    def head() -> Tensor:
        return (normal(vocabulary, width) / width**0.5).to(dtype)

    call: Call = {"hidden": normal(batch, tokens, width).to(dtype).requires_grad_(), "weight": head().requires_grad_()}
    call["tokens"] = torch.randint(vocabulary, (batch, tokens), generator=random)
    if guided:
        call |= {"hidden_uncond": normal(batch, tokens, width).to(dtype).requires_grad_(), "guidance": 1.5}
    scored = {name: call[name].detach() for name in LEAVES if name in call} | {"tokens": call["tokens"]}
    old = af.reference.token_log_prob(**scored, guidance=call.get("guidance", 1.0)).double()
    call["log_prob_old"] = (old + 0.05 * normal(batch, tokens)).to(torch.promote_types(dtype, torch.float32))
    advantages = normal(2, batch).float()
    call["advantages"] = (advantages[0], 2 * advantages[1]) if several else advantages[0]
    if reference:
        call |= {"hidden_ref": (call["hidden"].detach().double() + 0.3 * normal(batch, tokens, width)).to(dtype)}
        call |= {"weight_ref": head()}
    return call


def mapped(call: Call, change: Any) -> Call:
    """Every tensor changed, leaves made anew."""

    def of(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(of(part) for part in value)
        return change(value.detach()).requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value

    return {name: of(value) for name, value in call.items()}


def wide(call: Call) -> Call:
    return mapped(call, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor.clone())


def of_sequences(call: Call, rows: Any) -> Call:
    """Some sequences of a call, in another order."""
    whole = ("weight", "weight_ref")
    picked = mapped({name: value for name, value in call.items() if name not in whole}, lambda x: x[rows].clone())
    return picked | mapped({name: value for name, value in call.items() if name in whole}, Tensor.clone)


def value_and_gradients(loss: Any, call: Call, **options: Any) -> tuple[Any, list[Tensor]]:
    """The output, and gradients of what asks for one: hidden, weight, hidden_uncond."""
    out = loss(**call, **options)
    leaves = [call[name] for name in LEAVES if name in call]
    total = out.loss.sum() if hasattr(out, "loss") else out.sum()
    return out, list(torch.autograd.grad(total, leaves))


def naive(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    log_prob_old: Tensor,
    advantages: Tensor | tuple[Tensor, ...],
    hidden_uncond: Tensor | None = None,
    guidance: float = 1.0,
    hidden_ref: Tensor | None = None,
    weight_ref: Tensor | None = None,
    mask: Tensor | None = None,
    level: str = "sequence",
    surrogate: str = "ppo",
    clip: float = 0.2,
    kl_weight: float = 0.0,
    kl: str = "k3",
    entropy_weight: float = 0.0,
) -> Tensor:
    """``[B]``, without a thought to memory, overflow or damage."""
    logits = hidden @ weight.T
    if hidden_uncond is not None:
        other = hidden_uncond @ weight.T
        logits = other + guidance * (logits - other)
    counts = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask

    def mean(values: Tensor) -> Tensor:
        return torch.stack([row[keep].mean() for row, keep in zip(values, counts, strict=True)])

    log_p = logits.log_softmax(-1)
    log_prob = log_p.gather(-1, tokens[..., None])[..., 0]
    entropy = torch.distributions.Categorical(logits=logits).entropy()

    def of_ratio(log_ratio: Tensor, A: Tensor) -> Tensor:
        ratio = log_ratio.exp()
        terms = torch.stack([-A * ratio, -A * ratio.clamp(1 - clip, 1 + clip)])
        return terms.amax(0) if surrogate == "ppo" else terms.amin(0)

    losses = torch.zeros_like(mean(log_prob))
    for A in advantages if isinstance(advantages, tuple) else (advantages,):
        if level == "sequence":
            losses = losses + of_ratio(mean(log_prob - log_prob_old), A)
        else:
            losses = losses + mean(of_ratio(log_prob - log_prob_old, A[:, None]))
    if hidden_ref is not None and weight_ref is not None:
        log_q = (hidden_ref @ weight_ref.T).log_softmax(-1)
        d = log_q.gather(-1, tokens[..., None])[..., 0] - log_prob
        if kl == "exact":
            term = mean((log_p.exp() * (log_p - log_q)).sum(-1))
        elif level == "sequence":
            term = mean(d).exp() - mean(d) - 1
        else:
            term = mean(d.exp() - d - 1)
        losses = losses + kl_weight * term
    return losses - entropy_weight * mean(entropy)
