"""The scalar stage that ends every loss, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def summarise(
    means: Sequence[Tensor],  # [B] each
    advantages: Tensor,  # [B]
    extreme: Tensor,  # [B]
    flagged: Tensor,  # [B] bool
    finite: Tensor,  # [B] bool
    valid: Tensor,  # [B] bool
    *,
    largest: bool,
) -> Tensor:
    """The metrics in the order of :func:`advflow_ext.ops.loss_summary.loss_summary`."""
    usable = finite & valid
    columns = torch.stack([*means, advantages, advantages.abs()], 1).detach()
    averages = torch.where(usable[:, None], columns, 0).sum(0) / usable.sum().clamp(min=1)
    worst = torch.where(usable, extreme.detach().abs() if largest else -extreme.detach(), 0 if largest else -torch.inf)
    most = worst.new_full((1,), 0 if largest else -torch.inf) if not len(worst) else worst.amax(0, keepdim=True)
    counts = torch.stack([flagged & usable, ~finite, ~valid], 1).sum(0, dtype=averages.dtype)
    return torch.cat([averages, most if largest else -most, counts])


def reduce_losses(losses: Tensor, reduction: str) -> Tensor:
    """Dropped samples stay in the denominator, so that they cannot change the weight of the others."""
    if reduction == "none":
        return losses
    total = losses.sum()
    return total if reduction == "sum" else total / max(losses.shape[0], 1)
