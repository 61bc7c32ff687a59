"""What a few rows of logits say, and their gradient, in PyTorch: each call overwrites the logits that it is given."""

from __future__ import annotations

import torch
from torch import Tensor


def statistics(
    logits: Tensor,  # [N, V]
    others: Tensor | None,  # [N, V], the reference's
    tokens: Tensor,  # [N]
    log_prob: Tensor,  # [N], as all that follow: results
    entropy: Tensor,
    kl: Tensor | None,
    state: Tensor,  # [2 or 4, N]
) -> None:
    # All from z - max z: what is subtracted from each other below is no larger than the result or the logarithm of V.
    state[0] = logits.amax(1)
    z = logits.sub_(state[0, :, None])
    chosen = z.gather(1, tokens[:, None])[:, 0]
    weights = z.exp()
    state[1] = weights.sum(1)
    log_sum = state[1].log()
    torch.sub(chosen, log_sum, out=log_prob)
    if others is not None and kl is not None:
        state[2] = others.amax(1)
        others.sub_(state[2, :, None])
        state[3] = others.exp().sum(1)
        # KL = <z - z'> - (ln sum - ln sum'), < > the mean under the policy.
        of_difference = others.sub_(z).mul_(weights).sum(1) / state[1]
        torch.sub(state[3].log() - log_sum, of_difference, out=kl)
    torch.sub(log_sum, weights.mul_(z).sum(1) / state[1], out=entropy)


def gradient(
    logits: Tensor,
    others: Tensor | None,
    tokens: Tensor,
    entropy: Tensor,
    kl: Tensor | None,
    state: Tensor,
    a: Tensor,  # [N], as b and k: d loss / d log-probability, entropy, KL
    b: Tensor | None,
    k: Tensor | None,
    live: Tensor,  # [N] bool
    dtype: torch.dtype,
) -> Tensor:
    """Of the logits, in ``dtype``; exactly 0 where not ``live``::

    a (1[v = token] - p) - b p (ln p + H) + k p (ln p - ln q - KL)
    """
    z = logits.sub_(state[0, :, None])
    p = z.exp().div_(state[1, :, None])
    log_sum = state[1].log()
    slope, rest = torch.zeros_like(a), -a
    if b is not None:
        slope, rest = slope - b, rest - b * (entropy - log_sum)
    if k is not None and others is not None and kl is not None:
        slope, rest = slope + k, rest + k * (state[3].log() - log_sum - kl)
        z.mul_(slope[:, None]).sub_(others.sub_(state[2, :, None]).mul_(k[:, None]))
        p.mul_(z.add_(rest[:, None]))
    elif b is not None:
        p.mul_(z.mul_(slope[:, None]).add_(rest[:, None]))
    else:
        p.mul_(rest[:, None])
    p.scatter_add_(1, tokens[:, None], a[:, None])
    return p.masked_fill_(~live[:, None], 0).to(dtype)
