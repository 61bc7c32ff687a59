"""The policy loss of autoregressive image models (arXiv 2603.23086) in plain differentiable PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from advflow_ext.contract import checks
from advflow_ext.contract.numbers import Number, Numbers, constant, values_are_at_hand
from advflow_ext.contract.outputs import LossOutput
from advflow_ext.reference._token_output import TokenPolicyArguments, TokenStatistics, reach_of, token_policy_output

LEVELS = ("sequence", "token")
SURROGATES = ("ppo", "released")
KL_TERMS = ("k3", "exact")


def head_arguments(
    hidden: Tensor, weight: Tensor, tokens: Tensor, hidden_uncond: Tensor | None, guidance: Number
) -> tuple[Numbers, torch.dtype, Number]:
    """How numbers of this call are read, the dtype of its sums, and the guidance."""
    checks.require_float_tensor("hidden", hidden)
    if hidden.dim() != 3 or 0 in hidden.shape[1:]:
        raise ValueError(
            f"hidden has shape {list(hidden.shape)}; accepted is [B, T, H], sequences of at least one token."
        )
    _require_head("weight", weight, "hidden", hidden)
    _require_each_token("tokens", tokens, hidden)
    if tokens.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"tokens has dtype {tokens.dtype}; accepted are int64 and int32.")
    if hidden_uncond is not None:
        checks.require_like("hidden", "hidden_uncond", hidden_uncond, hidden)
    dtype = checks.accumulate_dtype(hidden, weight, hidden_uncond)
    numbers = Numbers(hidden, dtype, name="hidden")
    if hidden_uncond is not None:
        return numbers, dtype, numbers.read("guidance", guidance)
    if isinstance(guidance, Tensor) or guidance != 1:
        raise ValueError("guidance is given without hidden_uncond; accepted are 1, or hidden_uncond beside it.")
    return numbers, dtype, 1.0


def token_policy_arguments(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    log_prob_old: Tensor,
    advantages: Tensor | Sequence[Tensor],
    hidden_uncond: Tensor | None,
    guidance: Number,
    hidden_ref: Tensor | None,
    weight_ref: Tensor | None,
    log_prob_ref: Tensor | None,
    mask: Tensor | None,
    level: str,
    surrogate: str,
    clip: Number | tuple[Number, Number],
    kl_weight: Number,
    kl: str,
    entropy_weight: Number,
    reduction: str,
) -> TokenPolicyArguments:
    numbers, _, guidance = head_arguments(hidden, weight, tokens, hidden_uncond, guidance)
    for name, value, accepted in (
        ("level", level, LEVELS),
        ("surrogate", surrogate, SURROGATES),
        ("kl", kl, KL_TERMS),
        ("reduction", reduction, checks.REDUCTIONS),
    ):
        checks.require_choice(name, value, accepted)
    _require_log_prob("log_prob_old", log_prob_old, hidden)
    given = [advantages] if isinstance(advantages, Tensor) else list(advantages)
    if not given:
        raise ValueError("advantages is empty; accepted are a tensor [B] and several of them.")
    for k, each in enumerate(given):
        _require_each_sequence("advantages" if isinstance(advantages, Tensor) else f"advantages[{k}]", each, hidden)
    _check_reference(hidden, weight, hidden_ref, weight_ref, log_prob_ref, kl)
    reference = hidden_ref if hidden_ref is not None else log_prob_ref
    if mask is not None:
        _require_each_token("mask", mask, hidden)
        if mask.dtype != torch.bool:
            raise ValueError(f"mask has dtype {mask.dtype}; accepted is bool, true where a token counts.")
    live = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.detach()

    bounds = numbers.clip("clip", clip, most=1.0)
    kl_weight = numbers.weight_of("kl_weight", kl_weight, "hidden_ref or log_prob_ref", reference, default=0.0)
    entropy_weight = numbers.read("entropy_weight", entropy_weight, low=0.0)
    known = (tokens >= 0) & (tokens < weight.shape[0])
    _check_tokens(tokens, live, known, weight.shape[0])
    wide = torch.float64
    return TokenPolicyArguments(
        tokens=constant(tokens, torch.int64).clamp(0, weight.shape[0] - 1),
        live=live,
        valid=(known | ~live).all(1) & live.any(1),
        log_prob_old=constant(log_prob_old, wide),
        log_prob_ref=None if log_prob_ref is None else constant(log_prob_ref, wide),
        advantages=torch.stack([numbers.contain(constant(each, wide)) for each in given]),
        clip=bounds,
        kl_weight=kl_weight,
        entropy_weight=entropy_weight,
        guidance=guidance,
        level=level,
        surrogate=surrogate,
        reduction=reduction,
        dtype=checks.accumulate_dtype(hidden, weight, hidden_uncond, hidden_ref, weight_ref),
    )


def mixed(hidden: Tensor, hidden_uncond: Tensor | None, guidance: Number, dtype: torch.dtype) -> Tensor:
    """The hidden states whose logits are those of classifier-free guidance, z_u + w (z_c - z_u), by linearity."""
    if hidden_uncond is None:
        return hidden
    if isinstance(guidance, Tensor):
        guidance = guidance.to(dtype).view(-1, 1, 1)
    return guidance * hidden.to(dtype) + (1 - guidance) * hidden_uncond.to(dtype)


def token_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    log_prob_old: Tensor,
    advantages: Tensor | Sequence[Tensor],
    *,
    hidden_uncond: Tensor | None = None,
    guidance: Number = 1.0,
    hidden_ref: Tensor | None = None,
    weight_ref: Tensor | None = None,
    log_prob_ref: Tensor | None = None,
    mask: Tensor | None = None,
    level: str = "sequence",
    surrogate: str = "ppo",
    clip: Number | tuple[Number, Number] = 0.2,
    kl_weight: Number = 0.0,
    kl: str = "k3",
    entropy_weight: Number = 0.0,
    reduction: str = "mean",
) -> LossOutput:
    """Same arguments, result and errors as :func:`advflow_ext.token_policy_loss`, by PyTorch autograd on all logits."""
    given = token_policy_arguments(
        hidden, weight, tokens, log_prob_old, advantages, hidden_uncond, guidance, hidden_ref, weight_ref,
        log_prob_ref, mask, level, surrogate, clip, kl_weight, kl, entropy_weight, reduction,
    )  # fmt: skip
    states = mixed(hidden, hidden_uncond, given.guidance, given.dtype)
    log_p = log_softmax(states, weight, given.dtype)
    log_q = None
    if hidden_ref is not None:
        head = weight if weight_ref is None else weight_ref
        log_q = log_softmax(hidden_ref.detach(), head.detach(), given.dtype)
    if log_q is not None and kl == "k3":
        given = given._replace(log_prob_ref=selected(log_q, given.tokens).double())
    found = TokenStatistics(
        log_prob=selected(log_p, given.tokens),
        entropy=-(log_p.exp() * log_p).sum(-1),
        kl=divergence(log_p, log_q) if log_q is not None and kl == "exact" else None,
    )
    return token_policy_output(given, found, reach_of(states, hidden, weight, given.live))


def token_log_prob(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    hidden_uncond: Tensor | None = None,
    guidance: Number = 1.0,
) -> Tensor:
    """Same arguments, result and errors as :func:`advflow_ext.token_log_prob`, by PyTorch autograd on all logits."""
    _, dtype, guidance = head_arguments(hidden, weight, tokens, hidden_uncond, guidance)
    known = (tokens >= 0) & (tokens < weight.shape[0])
    inside = constant(tokens, torch.int64).clamp(0, weight.shape[0] - 1)
    states = mixed(hidden, hidden_uncond, guidance, dtype)
    log_prob = selected(log_softmax(states, weight, dtype), inside)
    return torch.where(known, log_prob, torch.nan)


def log_softmax(hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """``[B, T, V]``; NaN, without a gradient, for a token whose logits are not finite."""
    with torch.no_grad():
        whole = torch.isfinite(weight)
        sound = torch.isfinite(hidden).all(-1, keepdim=True) & whole.all()
    with torch.autocast(hidden.device.type, enabled=False):
        logits = torch.where(sound, hidden, 0).to(dtype) @ torch.where(whole, weight, 0).to(dtype).T
    with torch.no_grad():
        sound = sound & torch.isfinite(logits).all(-1, keepdim=True)
    log_p = torch.where(sound, logits, 0).log_softmax(-1)
    return torch.where(sound, log_p, torch.nan)


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) ``[B, T]``; NaN, without a gradient, where log_q is not finite."""
    sound = torch.isfinite(log_q).all(-1)
    differences = log_p - torch.where(sound[..., None], log_q, 0)
    return torch.where(sound, (log_p.exp() * differences).sum(-1), torch.nan)


def selected(log_p: Tensor, tokens: Tensor) -> Tensor:
    return log_p.gather(-1, tokens[..., None])[..., 0]


def _require_head(name: str, weight: object, of: str, hidden: Tensor) -> None:
    checks.require_float_tensor(name, weight)
    assert isinstance(weight, Tensor)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[2] or not len(weight):
        raise ValueError(
            f"{name} has shape {list(weight.shape)}; accepted is [V, {hidden.shape[2]}], the vocabulary and the width "
            f"of {of}."
        )
    if weight.device != hidden.device:
        raise ValueError(f"{name} is on {weight.device}; accepted is the device of {of}, {hidden.device}.")


def _require_each_token(name: str, value: object, hidden: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} is a {type(value).__name__}; accepted is a torch.Tensor.")
    if value.shape != hidden.shape[:2]:
        raise ValueError(
            f"{name} has shape {list(value.shape)}; accepted is one value a token, {list(hidden.shape[:2])}."
        )
    if value.device != hidden.device:
        raise ValueError(f"{name} is on {value.device}; accepted is the device of hidden, {hidden.device}.")


def _require_each_sequence(name: str, value: object, hidden: Tensor) -> None:
    checks.require_float_tensor(name, value)
    assert isinstance(value, Tensor)
    if value.shape != hidden.shape[:1]:
        raise ValueError(
            f"{name} has shape {list(value.shape)}; accepted is one value a sequence, {list(hidden.shape[:1])}."
        )
    if value.device != hidden.device:
        raise ValueError(f"{name} is on {value.device}; accepted is the device of hidden, {hidden.device}.")


def _require_log_prob(name: str, value: object, hidden: Tensor) -> None:
    _require_each_token(name, value, hidden)
    assert isinstance(value, Tensor)
    if value.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{name} has dtype {value.dtype}; accepted are float32 and float64: half precision rounds a "
            "log-probability of -10 by 0.004 or 0.03."
        )


def _check_reference(
    hidden: Tensor,
    weight: Tensor,
    hidden_ref: Tensor | None,
    weight_ref: Tensor | None,
    log_prob_ref: Tensor | None,
    kl: str,
) -> None:
    if hidden_ref is not None and log_prob_ref is not None:
        raise ValueError("hidden_ref and log_prob_ref are both given; accepted is one of them.")
    if log_prob_ref is not None:
        _require_log_prob("log_prob_ref", log_prob_ref, hidden)
    if hidden_ref is None and kl == "exact":
        raise ValueError("kl is 'exact' without hidden_ref; accepted are 'k3', or hidden_ref beside it.")
    if hidden_ref is None:
        if weight_ref is not None:
            raise ValueError("weight_ref is given without hidden_ref; accepted is one beside it.")
        return
    checks.require_float_tensor("hidden_ref", hidden_ref)
    if hidden_ref.dim() != 3 or hidden_ref.shape[:2] != hidden.shape[:2] or not hidden_ref.shape[2]:
        raise ValueError(
            f"hidden_ref has shape {list(hidden_ref.shape)}; accepted is [{hidden.shape[0]}, {hidden.shape[1]}, width]."
        )
    if hidden_ref.device != hidden.device:
        raise ValueError(f"hidden_ref is on {hidden_ref.device}; accepted is the device of hidden, {hidden.device}.")
    if weight_ref is None and weight.requires_grad:
        raise ValueError(
            "weight_ref is None while weight is trained; accepted is the reference's own head, such as a copy of "
            "weight from before training."
        )
    head = weight if weight_ref is None else weight_ref
    _require_head("weight" if weight_ref is None else "weight_ref", head, "hidden_ref", hidden_ref)
    if head.shape[0] != weight.shape[0]:
        raise ValueError(
            f"weight_ref has {head.shape[0]} rows; accepted is the vocabulary of weight, {weight.shape[0]}."
        )


def _check_tokens(tokens: Tensor, live: Tensor, known: Tensor, vocabulary: int) -> None:
    if not (values_are_at_hand(tokens) and values_are_at_hand(live)):
        return
    wrong = live & ~known
    if wrong.any():
        b, t = (int(i) for i in wrong.nonzero()[0])
        raise ValueError(
            f"tokens[{b}, {t}] is {int(tokens[b, t])}; accepted is 0 <= token < {vocabulary}, the rows of weight, or "
            "a mask that leaves it out."
        )
