"""The Fréchet distance to a reference where covariances are taken to be diagonal."""

from __future__ import annotations

import torch
from torch import Tensor


class Diagonal:
    """``|m - m_r|^2 + |s - s_r|^2`` with s the standard deviations; a covariance is the ``[d]`` variances."""

    def __init__(self, mean: Tensor, covariance: Tensor) -> None:
        self.mean = mean
        self._std = covariance.diagonal().clamp(min=0).sqrt()

    def of(self, rows: Tensor) -> Tensor:
        """The sum of the rows' squares."""
        return rows.square().sum(0)

    def trace(self, covariance: Tensor) -> Tensor:
        return covariance.sum()

    def distance(self, mean: Tensor, covariance: Tensor) -> Tensor:
        return (mean - self.mean).square().sum() + (covariance.clamp(min=0).sqrt() - self._std).square().sum()

    def root_change(self, covariance: Tensor, added: Tensor, removed: Tensor) -> Tensor:
        """What the sum of s s_r becomes more, ``[N]``, with the variances + ``added`` - each of ``removed`` squared."""
        change = added - removed.square()
        # A difference of roots as a quotient, which loses no digits where the change is small.
        roots = (covariance + change).clamp(min=0).sqrt() + covariance.sqrt()
        return torch.where(roots > 0, self._std * change / roots, 0).sum(1)
