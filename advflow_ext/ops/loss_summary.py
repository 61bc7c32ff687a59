"""The compiled scalar stage that ends every loss: its shapes for tracing, and a typed entry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from advflow_ext import _native


class LossSummary(NamedTuple):
    loss: Tensor  # [], or [B] for reduction "none"
    coef: Tensor  # [B, 3], with what the reduction divides by, zero for a sample that is not usable
    metrics: Tensor


def _register_fake() -> None:
    @torch.library.register_fake("advflow::loss_summary")  # type: ignore[untyped-decorator]
    def loss_summary_shapes(
        means: Sequence[Tensor],
        required: Sequence[Tensor],
        advantages: Tensor,
        extreme: Tensor,
        stats: Tensor,
        coef: Tensor,
        valid: Tensor,
        flagged: Tensor,
        stat_means: int,
        largest: bool,
        reduction: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        loss = stats.new_empty((stats.shape[0],) if reduction == "none" else ())
        metrics = stats.new_empty((len(means) + stat_means + 6,))
        return loss, torch.empty_like(coef, memory_format=torch.contiguous_format), metrics


if _native.module is not None:
    _register_fake()


def loss_summary(
    means: Sequence[Tensor],
    required: Sequence[Tensor],
    advantages: Tensor,
    extreme: Tensor,
    stats: Tensor,
    coef: Tensor,
    valid: Tensor,
    flagged: Tensor,
    *,
    stat_means: int,
    largest: bool,
    reduction: str,
) -> LossSummary:
    """Drops the samples that cannot be used, reduces the losses and reports what the batch was like, in one launch.

    A sample is usable when it is ``valid`` and every number given of it is finite: in ``means`` (up to 8 columns
    ``[B]``, the first the losses), ``required`` (up to 4 that are not reported), ``advantages``, ``extreme``, ``stats``
    ``[B, 8]`` and ``coef`` ``[B, 3]``. Metrics, in this order: the mean over usable samples of every column of
    ``means``, of the first ``stat_means`` columns of ``stats``, of A and of |A|; the smallest ``extreme`` (inf where no
    sample is usable) or, with ``largest``, the largest magnitude of it (else 0); how many usable samples are
    ``flagged``; how many samples are not finite; how many not valid. Everything is in one dtype, float32 or float64,
    and without gradient. Sums run in float64, in an order fixed by
    the batch size and the device.
    """
    outputs = torch.ops.advflow.loss_summary.default(
        means, required, advantages, extreme, stats, coef, valid, flagged, stat_means, largest, reduction
    )
    return LossSummary(*outputs)
