"""How exact leave-one-out FID is, and what it costs beside deletion: ``python -m bench.exactness.loo_fid --json FILE``.

Deletion recomputes the distance without each of some images, in float64. Seconds are those of the processor, on one
thread, which other work on the machine lengthens little; deletion's are of one image, times N.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import advflow_ext as af
from advflow_ext.bench.harness import report

BETAS = (0.5, 0.99)
CASES = (("diagonal", 2048, 1152), ("full", 256, 1152), ("full", 512, 144), ("full", 512, 1152), ("full", 2048, 1152))
DELETED = 12  # images that deletion is asked for


def timed(call: Callable[[], Tensor]) -> tuple[Tensor, float]:
    start = time.process_time()
    result = call()
    return result, time.process_time() - start


def features(count: int, width: int, seed: int, scale: float = 1.0) -> Tensor:
    """Not negative, correlated, variances falling by a power law: like a pooling layer's."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.Generator().manual_seed(width)
    spread = torch.arange(1, width + 1) ** -0.5 * (width / 8) ** 0.5
    mix = torch.randn(width, width, generator=mixing) / width**0.5
    rows: Tensor = 0.5 + scale * (torch.randn(count, width, generator=generator) * spread) @ mix
    return rows.relu()


class Deletion:
    """The distance of a moving distribution that lacks some images of its batch."""

    def __init__(self, reference: af.FeatureMoments, covariance: str, old: Tensor, batch: Tensor, beta: float) -> None:
        self._reference, self._full = reference, covariance == "full"
        self._old, self._batch, self._beta = old.double(), batch.double(), beta
        if self._full:
            values, vectors = torch.linalg.eigh(reference.covariance)
            self._root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T

    def distance(self, without: int | None) -> Tensor:
        kept = torch.ones(len(self._batch), dtype=torch.bool)
        if without is not None:
            kept[without] = False
        batch = self._batch[kept]
        rows = torch.cat([self._old, batch])
        shares = (self._beta / len(self._old), (1 - self._beta) / len(batch))
        weights = torch.repeat_interleave(
            torch.tensor(shares, dtype=torch.float64), torch.tensor([len(self._old), len(batch)])
        )
        mean = weights @ rows
        centred = (rows - mean) * weights.sqrt()[:, None]
        of_means = (mean - self._reference.mean).square().sum()
        if not self._full:
            stds = centred.square().sum(0).sqrt() - self._reference.covariance.diagonal().sqrt()
            return of_means + stds.square().sum()
        if len(rows) < rows.shape[1]:  # eigenvalues of zero would have roots of 1e-8
            roots = torch.linalg.svdvals(centred @ self._root).sum()
        else:
            roots = torch.linalg.eigvalsh(self._root @ (centred.T @ centred) @ self._root).clamp(min=0).sqrt().sum()
        full: Tensor = of_means + centred.square().sum() + self._reference.covariance.trace() - 2 * roots
        return full


def measure(covariance: str, width: int, count: int, beta: float) -> dict[str, Any]:
    reference = af.FeatureMoments.of(features(4 * width, width, 1))
    old, batch = features(count, width, 2, 0.9), features(count, width, 3, 0.8)
    start = time.process_time()
    distance = af.LeaveOneOutFID(reference, beta, covariance)
    making = time.process_time() - start
    distance.update(old)
    rewards, seconds = timed(lambda: distance.reward(batch))

    deletion = Deletion(reference, covariance, old, batch, beta)
    whole = deletion.distance(None)
    some = range(0, count, count // DELETED)
    without, deleting = timed(lambda: torch.stack([deletion.distance(i) for i in some]))
    true = (without - whole) * (count - 1) / (1 - beta)
    error = (rewards[list(some)].double() - true).abs().max() / rewards.double().std()
    return {
        "covariance": covariance,
        "features": width,
        "images": count,
        "beta": beta,
        "deleted": len(some),
        "error_over_std": float(error),
        "reward_std": float(rewards.double().std()),
        "seconds": seconds,
        "seconds_to_make": making,
        "seconds_by_deletion": deleting / len(some) * count,
    }


def ranks(values: Tensor) -> Tensor:
    return values.argsort().argsort().double()


def agreement(width: int, count: int, beta: float) -> dict[str, Any]:
    """Spearman's correlation of the two covariances' rewards."""
    reference = af.FeatureMoments.of(features(4 * width, width, 1))
    old, batch = features(count, width, 2, 0.9), features(count, width, 3, 0.8)
    both = []
    for covariance in ("diagonal", "full"):
        distance = af.LeaveOneOutFID(reference, beta, covariance)
        distance.update(old)
        both.append(ranks(distance.reward(batch)))
    return {
        "features": width, "images": count, "beta": beta, "spearman": float(torch.corrcoef(torch.stack(both))[0, 1])
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--largest", type=int, default=2048, help="leave cases with more features out")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {"environment": report.environment(torch.device("cpu")), "results": [], "agreement": []}
    for covariance, width, count in CASES:
        if width > arguments.largest:
            continue
        for beta in BETAS:
            result["results"].append(measure(covariance, width, count, beta))
            print(result["results"][-1], flush=True)
            arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    result["agreement"] = [agreement(256, 1152, beta) for beta in BETAS]
    arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
