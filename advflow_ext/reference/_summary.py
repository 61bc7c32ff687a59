"""The scalar stage that ends every loss, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from advflow_ext.contract.numbers import Number, per_sample
from advflow_ext.contract.outputs import Ratio


def summarise(
    means: Sequence[Tensor],  # [B] each
    advantages: Tensor,  # [B]
    extreme: Tensor,  # [B]
    flagged: Tensor,  # [B] bool
    finite: Tensor,  # [B] bool
    valid: Tensor,  # [B] bool
    *,
    largest: bool,
    contrast: Tensor | None = None,  # [B], <(v-v_old)^2>
    ratio: Ratio | None = None,
) -> Tensor:
    """The metrics in the order of :func:`advflow_ext.kernels.loss_summary.loss_summary`."""
    usable = finite & valid
    columns = torch.stack([*means, advantages, advantages.abs()], 1).detach()
    averages = torch.where(usable[:, None], columns, 0).sum(0) / usable.sum().clamp(min=1)
    worst = torch.where(usable, extreme.detach().abs() if largest else -extreme.detach(), 0 if largest else -torch.inf)
    most = worst.new_full((1,), 0 if largest else -torch.inf) if not len(worst) else worst.amax(0, keepdim=True)
    counts = torch.stack([flagged & usable, ~finite, ~valid], 1).sum(0, dtype=averages.dtype)
    parts = [averages, most if largest else -most, counts]
    share = usable.to(averages.dtype) / usable.sum().clamp(min=1)
    if contrast is not None:
        parts.append((share * (contrast.detach() > 0)).sum(0, keepdim=True))
    if ratio is not None:
        parts.append(of_ratio(ratio, usable, share))
    return torch.cat(parts)


def of_ratio(ratio: Ratio, usable: Tensor, share: Tensor) -> Tensor:
    """:data:`advflow_ext.contract.outputs.RATIO_METRICS`."""
    log_ratio = torch.where(usable, ratio.log_ratio.detach(), 0)
    # In float64: of a ratio this near to 1 float32 has no digits left of r - 1 squared.
    x = log_ratio.double().clamp(max=80)
    excess = x.expm1()
    beyond = [
        torch.zeros_like(usable) if bound is None else (log_ratio > bound if above else log_ratio < bound)
        for above, bound in ((True, ratio.log_highest), (False, ratio.log_lowest))
    ]
    means = (share.double()[:, None] * torch.stack([x.square() / 2, excess, excess.square(), *beyond], 1)).sum(0)
    kl, mean, square, above, below = means.unbind()
    none = ~usable.any()
    # With a place of their own for batches of nobody.
    ends = torch.where(none, 0, torch.stack([_largest(-x, usable).neg(), _largest(x, usable)])).exp()
    std = (square - mean.square()).clamp(min=0).sqrt()
    return torch.stack([kl, 1 + mean, std, *ends.unbind(), above, below]).to(log_ratio.dtype)


def _largest(values: Tensor, usable: Tensor) -> Tensor:
    return torch.cat([torch.where(usable, values, -torch.inf), values.new_full((1,), -torch.inf)]).amax()


@torch.no_grad()
def gradient_fits(weights: Sequence[Number], squares: Sequence[Tensor], v: Tensor) -> Tensor:
    """``[B]``: whether no element of a gradient 2 / D sum_k weight_k residual_k can overflow v's dtype.

    ``squares`` are the means of the residuals' squares; an element is at most sqrt(D) times the root of its mean.
    """
    parts = [
        per_sample(weight, square).double().abs() * square.double().sqrt()
        for weight, square in zip(weights, squares, strict=True)
    ]
    most = torch.stack(parts).sum(0)
    root = max(v[:1].numel() if v.shape[0] else 0, 1) ** 0.5
    # What is added up must fit too, before its factor 2 / D.
    fits: Tensor = most <= min(torch.finfo(v.dtype).max / 2 * root, torch.finfo(squares[0].dtype).max / root)
    return fits


def reduce_losses(losses: Tensor, reduction: str) -> Tensor:
    """Dropped samples stay in the denominator, so that they cannot change the weight of the others."""
    if reduction == "none":
        return losses
    total = losses.sum()
    return total if reduction == "sum" else total / max(losses.shape[0], 1)
