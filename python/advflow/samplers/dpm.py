"""DPM-Solver++ of second order."""

from __future__ import annotations

import itertools
import math

import torch

from advflow.samplers.sampling import VelocityAt


class DPM:
    def __call__(self, velocity: VelocityAt, x: torch.Tensor, sigmas: list[float]) -> torch.Tensor:
        step = MultistepDPM(sigmas)
        for sigma, next_sigma in itertools.pairwise(sigmas):
            x = step(x, velocity(x, sigma), sigma, next_sigma)
        return x


class MultistepDPM:
    """DPM-Solver++(2M) in half-log-SNR with data prediction, the rollout solver of DiffusionNFT's code ("dpm2").

    Alpha = 1 - sigma, lambda = log(alpha / sigma). The first and the last step are of first order: at sigma 1 and at
    sigma 0 lambda is infinite, and the second-order term vanishes with 1 / r.
    """

    def __init__(self, sigmas: list[float]) -> None:
        self._last = sigmas[-2]
        self._x0: torch.Tensor | None = None  # the data prediction of the step before
        self._h = math.inf  # and its length in lambda

    def __call__(self, x: torch.Tensor, v: torch.Tensor, sigma: float, next_sigma: float) -> torch.Tensor:
        x0 = x - sigma * v
        h = _half_log_snr(next_sigma) - _half_log_snr(sigma)
        direction = x0
        if self._x0 is not None and sigma != self._last and math.isfinite(self._h):
            direction = x0 + (h / (2 * self._h)) * (x0 - self._x0)
        self._x0, self._h = x0, h
        return (next_sigma / sigma) * x - (1 - next_sigma) * math.expm1(-h) * direction


def _half_log_snr(sigma: float) -> float:
    if sigma >= 1:
        return -math.inf
    return math.log((1 - sigma) / sigma) if sigma > 0 else math.inf
