"""The compiled scalar stage that ends every loss: its shapes for tracing, and a typed entry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from advflow_ext import _native
from advflow_ext._native import STATS
from advflow_ext.contract.checks import REDUCTIONS
from advflow_ext.contract.numbers import Number
from advflow_ext.contract.outputs import Ratio
from advflow_ext.kernels.raw_checks import check_device, check_float, check_like, check_served

# How many columns at most, how many metrics every loss has, how many a ratio adds: csrc/torch/bindings.cpp.
_COUNTS: dict[str, int] = {} if _native.module is None else _native.module.SUMMARY


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
        log_ratio: Tensor | None = None,
        log_lowest: Tensor | None = None,
        log_highest: Tensor | None = None,
        v: Tensor | None = None,
        contrast: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if stats.dim() != 2 or stats.shape[1] != len(STATS):
            raise RuntimeError(f"stats has shape {list(stats.shape)}; accepted is [B, {len(STATS)}].")
        if stats.dtype not in (torch.float32, torch.float64):
            raise RuntimeError(f"stats has dtype {stats.dtype}; accepted are float32 and float64.")
        if not means:
            raise RuntimeError("means is empty; accepted are the losses and what else to report.")
        batch = stats.shape[0]
        for name, columns in (("means", means), ("required", required)):
            if len(columns) > _COUNTS[name]:
                raise RuntimeError(f"{name} has {len(columns)} columns; accepted are at most {_COUNTS[name]}.")
            for k, column in enumerate(columns):
                check_like(f"{name}[{k}]", column, (batch,), stats.dtype, stats)
        check_like("advantages", advantages, (batch,), stats.dtype, stats)
        check_like("extreme", extreme, (batch,), stats.dtype, stats)
        check_like("coef", coef, (batch, 3), stats.dtype, stats)
        check_like("valid", valid, (batch,), torch.bool, stats)
        check_like("flagged", flagged, (batch,), torch.bool, stats)
        if not 0 <= stat_means <= _COUNTS["stat_means"]:
            raise RuntimeError(f"stat_means is {stat_means}; accepted are 0 to {_COUNTS['stat_means']}.")
        if reduction not in REDUCTIONS:
            raise RuntimeError(f"reduction is {reduction!r}; accepted are 'mean', 'sum' and 'none'.")
        if log_ratio is not None:
            check_like("log_ratio", log_ratio, (batch,), stats.dtype, stats)
        for name, bound in (("log_lowest", log_lowest), ("log_highest", log_highest)):
            if bound is not None and log_ratio is None:
                raise RuntimeError(f"{name} is given without log_ratio; accepted is one beside it.")
            if bound is not None:
                check_like(name, bound, (batch,) if bound.dim() else (), stats.dtype, stats)
        if v is not None and (v.dim() == 0 or v.shape[0] != batch):
            raise RuntimeError(f"v has shape {list(v.shape)}; accepted is [{batch}, ...].")
        if v is not None:
            check_device("v", v, stats, "stats")
            check_float("v", v)
        check_served("loss_summary", stats.dtype, stats)
        loss = stats.new_empty((stats.shape[0],) if reduction == "none" else ())
        more = int(contrast) + (_COUNTS["ratio_metrics"] if log_ratio is not None else 0)
        metrics = stats.new_empty((len(means) + stat_means + _COUNTS["metrics"] + more,))
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
    ratio: Ratio | None = None,
    v: Tensor | None = None,
    contrast: bool = False,
) -> LossSummary:
    """Drops the samples that cannot be used, reduces the losses and reports what the batch was like, in one launch.

    A sample is usable when it is ``valid`` and every number given of it is finite: in ``means`` (up to 8 columns
    ``[B]``, the first the losses), ``required`` (up to 4 that are not reported), ``advantages``, ``extreme``, ``stats``
    ``[B, 8]`` and ``coef`` ``[B, 3]``. Metrics, in this order: the mean over usable samples of every column of
    ``means``, of the first ``stat_means`` columns of ``stats``, of A and of |A|; the smallest ``extreme`` (inf where no
    sample is usable) or, with ``largest``, the largest magnitude of it (else 0); how many usable samples are
    ``flagged``; how many samples are not finite; how many not valid; with ``contrast`` the share of usable samples
    whose <(v-v_old)^2> is not 0; with a ``ratio`` :data:`advflow_ext.contract.outputs.RATIO_METRICS` of it. Everything
    is in one dtype, float32 or float64, and without gradient. Sums run in float64, in an order fixed by the batch size
    and the device.

    With ``v`` a sample must also have a gradient that no element of v's dtype can be too small for, before the
    reduction divides it: coef times the root mean squares of (v-u), (v-v_old) and (v-v_ref), times 2 / sqrt(D), bounds
    it.
    """
    log_ratio, lowest, highest = (None, None, None) if ratio is None else ratio
    outputs = torch.ops.advflow.loss_summary.default(
        means, required, advantages, extreme, stats, coef, valid, flagged, stat_means, largest, reduction,
        log_ratio, _bound(lowest, stats), _bound(highest, stats), v, contrast,
    )  # fmt: skip
    return LossSummary(*outputs)


def _bound(bound: Number | None, stats: Tensor) -> Tensor | None:
    if bound is None:
        return None
    return bound.to(stats.dtype) if isinstance(bound, Tensor) else stats.new_full((), bound)
