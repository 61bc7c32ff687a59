"""How good and how varied a set of images is, by its features or by what was recognised in it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from advflow_ext.contract.checks import require_count
from advflow_ext.distribution._rows import require_features

_ROWS = 512  # of a matrix of distances that exist at a time


class PrecisionRecall(NamedTuple):
    """Of :func:`precision_recall`: the share of generated images among the real ones, and of real among generated."""

    precision: Tensor
    recall: Tensor


class ModeCoverage(NamedTuple):
    """Of :func:`mode_coverage`: the share of modes that occur, how unequally, and the share of images with a mode."""

    share: Tensor
    kl: Tensor
    recognised: Tensor


@torch.no_grad()
def precision_recall(generated: Tensor, real: Tensor, k: int = 3) -> PrecisionRecall:
    """Improved precision and recall of features ``[N, d]`` and ``[M, d]`` (arXiv 1904.06991, eq. 1 and 2), float64 [].

    A set covers the balls around its rows whose radius is the distance to the row's k-th nearest neighbour in the set.
    Precision is the share of generated rows that real ones cover, recall the share of real rows that generated ones
    cover. Both depend on N and M: compare at equal ones.

    Raises ValueError for other shapes, rows that are not finite, and a k that is not below N and M.
    """
    for name, rows in (("generated", generated), ("real", real)):
        _require_finite(name, rows)
    if generated.shape[1] != real.shape[1] or generated.device != real.device:
        raise ValueError(
            f"generated is {list(generated.shape)} on {generated.device} and real {list(real.shape)} on {real.device}; "
            "accepted are [N, d] and [M, d] on one device."
        )
    require_count("k", k, 1)
    if k >= min(len(generated), len(real)):
        raise ValueError(f"k is {k} with {len(generated)} and {len(real)} rows; accepted is a k below both.")
    generated, real = generated.detach().double(), real.detach().double()
    return PrecisionRecall(_covered(generated, real, k), _covered(real, generated, k))


@torch.no_grad()
def vendi_score(features: Tensor) -> Tensor:
    """How many different images a set is worth, from 1 to N, float64 []: the Vendi score (arXiv 2210.02410).

    The exponential of the entropy of the eigenvalues of K / N, K the cosine similarities of the rows of ``[N, d]``. At
    most d for N above d; negative similarities count as such.

    Raises ValueError for other shapes, no row, and rows that are not finite or have no direction.
    """
    _require_finite("features", features)
    rows = features.detach().double()
    length = rows.norm(dim=1, keepdim=True)
    if not len(rows) or not (length > 0).all():
        raise ValueError(
            f"features has {int((length == 0).sum())} rows without a direction of {len(rows)}; accepted is at least "
            "one row, and none of zeros."
        )
    rows = rows / length
    small = rows @ rows.T if len(rows) <= rows.shape[1] else rows.T @ rows  # the same eigenvalues, but for zeros
    values = torch.linalg.eigvalsh(small / len(rows)).clamp(min=0)
    entropy: Tensor = torch.special.entr(values).sum()
    return entropy.exp()


@torch.no_grad()
def mode_coverage(labels: Tensor, modes: int) -> ModeCoverage:
    """Which of ``modes`` a set of images shows, by a classifier's labels ``[N]`` from 0 to modes - 1.

    A negative label says that nothing was recognised. ``share`` is the share of modes that occur; ``kl`` the divergence
    of their frequencies among the recognised from equal ones, in nats, 0 at best and log(modes) at worst (the two
    numbers of stacked MNIST in arXiv 1611.02163, there with a count for the share); ``recognised`` the share of images.
    Where none is recognised, share is 0 and kl at its worst.

    Raises ValueError for labels that are not ``[N]`` integers below ``modes``, N at least 1.
    """
    require_count("modes", modes, 1)
    if (
        not isinstance(labels, Tensor)
        or labels.is_floating_point()
        or labels.is_complex()
        or labels.dtype == torch.bool
    ):
        kind = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise ValueError(f"labels is {kind}; accepted is a torch.Tensor of integers [N].")
    if labels.dim() != 1 or not len(labels):
        raise ValueError(f"labels has shape {list(labels.shape)}; accepted is [N], N at least 1.")
    if labels.max() >= modes:
        raise ValueError(f"labels holds {int(labels.max())}; accepted are numbers below modes, {modes}.")
    recognised = labels[labels >= 0].long()
    counts = torch.bincount(recognised, minlength=modes).double()
    entropy = torch.special.entr(counts / max(len(recognised), 1)).sum()
    return ModeCoverage((counts > 0).double().mean(), math.log(modes) - entropy, counts.sum() / len(labels))


def _covered(rows: Tensor, by: Tensor, k: int) -> Tensor:
    """The share of ``rows`` that lie within a radius of ``by``."""
    # Of a row's distances to its own set the smallest is 0, its own.
    radii = torch.cat([_distances(part, by).kthvalue(k + 1).values for part in by.split(_ROWS)])
    inside = [(_distances(part, by) <= radii).any(1) for part in rows.split(_ROWS)]
    return torch.cat(inside).double().mean()


def _distances(rows: Tensor, others: Tensor) -> Tensor:
    # By a matrix product equal rows would have a distance, and a ball of radius 0 would miss its own centre.
    return torch.cdist(rows, others, compute_mode="donot_use_mm_for_euclid_dist")


def _require_finite(name: str, value: object) -> None:
    require_features(name, value)
    assert isinstance(value, Tensor)
    wrong = int((~value.isfinite()).any(1).sum())
    if wrong:
        raise ValueError(f"{name} has {wrong} rows that are not finite; accepted are finite ones.")
