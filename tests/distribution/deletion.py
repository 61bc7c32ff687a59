"""Leave-one-out rewards as they are defined: each image deleted in turn, moments and distance from scratch, float64."""

from __future__ import annotations

import torch
from torch import Tensor

import advflow_ext as af

Parts = list[tuple[float, Tensor]]  # sets of rows, each with its share of the weight


def root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def distance(parts: Parts, reference: af.FeatureMoments, covariance: str) -> Tensor:
    weights = torch.cat([torch.full((len(rows),), share / len(rows), dtype=torch.float64) for share, rows in parts])
    rows = torch.cat([rows for _, rows in parts]).double()
    mean = weights @ rows
    centred = (rows - mean) * weights.sqrt()[:, None]
    of_means = (mean - reference.mean).square().sum()
    if covariance == "diagonal":
        stds = centred.square().sum(0).sqrt(), reference.covariance.diagonal().sqrt()
        return of_means + (stds[0] - stds[1]).square().sum()
    # The sum of the singular values of X R for C = X^T X: eigenvalues of R C R would have half the digits.
    roots = torch.linalg.svdvals(centred @ root(reference.covariance)).sum()
    return of_means + centred.square().sum() + reference.covariance.trace() - 2 * roots


def rewards(history: list[Tensor], batch: Tensor, reference: af.FeatureMoments, beta: float, covariance: str) -> Tensor:
    """Of the batch's rows, after updates with ``history``."""
    old: Parts = []
    for rows in history:
        old = [(share * beta, each) for share, each in old] + [((1 - beta) if old else 1.0, rows)]
    beta = beta if old else 0.0
    old = [(share * beta, each) for share, each in old if beta]
    whole = distance([*old, (1 - beta, batch)], reference, covariance)
    without = [torch.cat([batch[:i], batch[i + 1 :]]) for i in range(len(batch))]
    changes = [distance([*old, (1 - beta, rows)], reference, covariance) - whole for rows in without]
    return torch.stack(changes) * (len(batch) - 1) / (1 - beta)


def features(count: int, width: int, seed: int, *, shift: float = 0.0, scale: float = 1.0) -> Tensor:
    """Rows of a normal distribution with correlated features of unequal spread."""
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.randn(width, width, generator=generator, dtype=torch.float64)
    spread = scale * torch.arange(1, width + 1, dtype=torch.float64) ** -0.5
    return shift + torch.randn(count, width, generator=generator, dtype=torch.float64) * spread @ rotation
