"""The policy loss of autoregressive image models (arXiv 2603.23086), head and softmax included, without logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from advflow_ext import _native, reference
from advflow_ext.contract.numbers import Number, constant, made_in_inference_mode
from advflow_ext.contract.outputs import LossOutput
from advflow_ext.kernels import linear_softmax  # noqa: F401  (its operators)
from advflow_ext.reference._token_output import TokenStatistics, reach_of, token_policy_output
from advflow_ext.reference.token_policy import head_arguments, mixed, token_policy_arguments


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
    """Clipped policy gradient on sequences of image tokens, from the hidden states that the head would read.

    With logits z = hidden @ weight.T, p = softmax(z), l = log p[token], H = -sum_v p_v log p_v and <.> the mean over
    the tokens of a sequence that count::

        r = exp(<l - log_prob_old>)                                                           level="sequence"
        loss = sum_A max(-A r, -A clip(r, 1 - clip, 1 + clip)) + kl_weight KL - entropy_weight <H>
        KL = exp(d) - d - 1,  d = <log_prob_ref - l>                                          kl="k3"
        KL = <sum_v p_v (log p_v - log q_v)>,  q the reference's softmax                      kl="exact"

    With ``level="token"`` every token has its own ratio and its own d, and <.> is taken of the terms.

    Neither the logits nor the probabilities of a whole batch exist at any time: 16 MiB of them are made at once, by one
    product of matrices for a part of a sequence, and made again in the backward pass.

    Arguments:
        hidden: ``[B, T, H]``, what the head reads at the places that predict each of the T tokens: receives a gradient.
        weight: the head ``[V, H]``, without a bias: receives a gradient where it asks for one.
        tokens: int64 or int32 ``[B, T]``, what was sampled.
        log_prob_old: of the rollout policy, float32 or float64 ``[B, T]``: :func:`token_log_prob`'s, whose bits make
            the first ratio exactly 1.
        advantages: ``[B]``, see :func:`group_advantages`, or several such tensors, each with its own clip on the one
            ratio: those of rewards of images and ``2 *`` those of :class:`LeaveOneOutFID` are the released trainer's.
        hidden_uncond: hidden states without the condition, shaped like hidden, with a gradient too: the policy is then
            that of classifier-free guidance, of logits z_u + guidance (z - z_u), by one product with the head.
        guidance: that factor, a number or a tensor ``[]`` or ``[B]``; 1 is no guidance. LlamaGen's ``cfg_scale``.
        hidden_ref: the reference's hidden states ``[B, T, width]``, mixed as above where it is guided.
        weight_ref: the reference's head ``[V, width]``. None: ``weight``, which must then be frozen.
        log_prob_ref: in the place of hidden_ref and for ``kl="k3"``, the reference's log-probabilities as log_prob_old.
        mask: bool ``[B, T]``, true where a token counts; what stands elsewhere is never looked at. None: all count.
        level: "sequence", one ratio of the mean log-probability (the released trainer's, GSPO's), or "token".
        surrogate: "ppo", the larger of the two terms, or "released", the smaller one, as the released trainer has it:
            that pushes on a ratio which has left the range, and not on one that would return.
        clip: at least 0, below 1, or a pair (below, above) for 1-below and 1+above.
        kl_weight: weight of the reference term, at least 0; above 0 it needs hidden_ref or log_prob_ref. The released
            launch script has 3.
        kl: "k3", of the sampled tokens, or "exact", over the vocabulary, which needs hidden_ref.
        entropy_weight: weight of the entropy, at least 0. The released one moves between 7e-5 and 4e-3.
        reduction: "mean" over B, "sum", or "none" for ``[B]``.

    clip, kl_weight and entropy_weight are numbers or tensors ``[]`` or ``[B]``, which may change at every step under
    torch.compile. Hidden states and heads may mix float32, float16 and bfloat16 freely and have any strides; sums are
    float32, or float64 as soon as one of them is; ratios and the clip are float64. On a GPU a bfloat16 head is
    multiplied as such and added up in float32; float32 there is as exact as ``torch.backends.cuda.matmul`` says.
    The result is deterministic, and a sequence's loss and gradient to hidden are bitwise independent of the batch
    around it.

    A sequence with a non-finite number in what counts, or whose loss or gradient is not one its dtype can hold, has
    zero loss and gradient, is counted in ``metrics`` and leaves every other untouched; so is one without a token that
    counts. A ratio that overflows and is clipped is clipped like any other.

    Raises ValueError, naming argument, value and what is accepted, for wrong shapes, dtypes, devices, names and
    numbers, and on CPU for a token outside the vocabulary; on CUDA and under torch.compile such sequences are dropped
    and counted.
    """
    given_tensors = (hidden, weight, hidden_uncond, tokens, log_prob_old, hidden_ref, weight_ref, log_prob_ref, mask)
    given_advantages = (advantages,) if isinstance(advantages, Tensor) else tuple(advantages)
    if _native.transformed(*given_tensors, *given_advantages):
        return reference.token_policy_loss(
            hidden, weight, tokens, log_prob_old, advantages,
            hidden_uncond=hidden_uncond, guidance=guidance, hidden_ref=hidden_ref, weight_ref=weight_ref,
            log_prob_ref=log_prob_ref, mask=mask, level=level, surrogate=surrogate, clip=clip, kl_weight=kl_weight,
            kl=kl, entropy_weight=entropy_weight, reduction=reduction,
        )  # fmt: skip
    given = token_policy_arguments(
        hidden, weight, tokens, log_prob_old, advantages, hidden_uncond, guidance, hidden_ref, weight_ref,
        log_prob_ref, mask, level, surrogate, clip, kl_weight, kl, entropy_weight, reduction,
    )  # fmt: skip
    states = mixed(hidden, hidden_uncond, given.guidance, given.dtype)
    others, head_ref = None, None
    if hidden_ref is not None:
        others, head_ref = hidden_ref.detach(), (weight if weight_ref is None else weight_ref).detach()
    if others is not None and head_ref is not None and kl == "k3":
        log_prob_ref = _statistics(others, head_ref, given.tokens, None, None)[0]
        given = given._replace(log_prob_ref=log_prob_ref.double())
        others = head_ref = None
    log_prob, entropy, exact, _ = _statistics(states, weight, given.tokens, others, head_ref)
    found = TokenStatistics(log_prob, entropy, exact if others is not None else None)
    return token_policy_output(given, found, reach_of(states, hidden, weight, given.live))


def token_log_prob(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    hidden_uncond: Tensor | None = None,
    guidance: Number = 1.0,
) -> Tensor:
    """Log-probabilities ``[B, T]`` of sampled tokens, with a gradient, as :func:`token_policy_loss` forms them.

    Arguments, dtypes, memory and determinism as there. What a rollout keeps as ``log_prob_old``: scored by the same
    forward pass as the loss scores, in the same precision, the first ratio is exactly 1.

    Result in float32, or float64 as soon as an argument is; NaN for a token outside the vocabulary or of hidden states
    that are not finite, which then receive no gradient.

    Raises ValueError, naming argument, value and what is accepted.
    """
    if _native.transformed(hidden, weight, tokens, hidden_uncond):
        return reference.token_log_prob(hidden, weight, tokens, hidden_uncond=hidden_uncond, guidance=guidance)
    _, dtype, guidance = head_arguments(hidden, weight, tokens, hidden_uncond, guidance)
    known = (tokens >= 0) & (tokens < weight.shape[0])
    inside = constant(tokens, torch.int64).clamp(0, weight.shape[0] - 1)
    states = mixed(hidden, hidden_uncond, guidance, dtype)
    log_prob = _statistics(states, weight, inside, None, None)[0]
    usable = known & torch.isfinite(log_prob.detach())
    return torch.where(usable, log_prob, torch.nan)


def _statistics(
    hidden: Tensor, weight: Tensor, tokens: Tensor, hidden_ref: Tensor | None, weight_ref: Tensor | None
) -> list[Tensor]:
    tensors = [
        each.clone() if each is not None and made_in_inference_mode(each) else each
        for each in (hidden, weight, hidden_ref, weight_ref)
    ]
    found: list[Tensor] = torch.ops.advflow.token_statistics(*tensors[:2], tokens, *tensors[2:])
    return found
