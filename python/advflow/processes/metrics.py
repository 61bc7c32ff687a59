"""Metrics of micro-batches as those of an update, or of an iteration."""

from __future__ import annotations

import torch

import advflow_ext as af
from advflow.core.ranks import Ranks
from advflow_ext.contract.outputs import Join

WeightedMetrics = tuple[af.LossMetrics, float]


def of_all_ranks(updates: list[list[WeightedMetrics]], ranks: Ranks) -> list[list[WeightedMetrics]]:
    """Every process's metrics, by update: each may have had other micro-batches, or none."""
    if ranks.size == 1:
        return updates
    told = [[(*_plain(metrics), weight) for metrics, weight in parts] for parts in updates]
    joined: list[list[WeightedMetrics]] = [[] for _ in updates]
    for of_rank in ranks.everyone(told):
        for parts, update in zip(joined, of_rank, strict=True):
            parts += [
                (af.LossMetrics(torch.tensor(values), tuple(names), unbounded), weight)
                for values, names, unbounded, weight in update
            ]
    return joined


def _plain(metrics: af.LossMetrics) -> tuple[list[float], tuple[str, ...], str]:
    return metrics.values.tolist(), metrics.names, metrics.unbounded


def join_metrics(parts: list[WeightedMetrics]) -> dict[str, float]:
    """One set of metrics from those of several micro-batches and their weights; waits for the device once.

    :attr:`advflow_ext.LossMetrics.joins` says how.
    """
    first = parts[0][0]
    values = torch.stack([metrics.values for metrics, _ in parts]).cpu()
    weights = torch.tensor([weight for _, weight in parts])
    joined: dict[str, float] = {}
    for name, how, column in zip(first.names, first.joins, values.unbind(1), strict=True):
        joined[name] = _joined(how, column, weights).item()
    return joined


def _joined(how: Join, column: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    if how == "min":
        return column.min()
    if how == "max":
        return column.max()
    if how == "sum":
        return column.sum()
    if how == "root_mean_square":
        return (column.square() * weights).sum().sqrt()
    return (column * weights).sum()
