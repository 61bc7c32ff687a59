"""The Fréchet distance to a reference with whole covariances, and how it changes when one sample is left out."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Trapezoids of this width in log t. The nearest singularities lie at +-pi/2 i: an error of exp(-pi^2 / width), 2e-11.
_WIDTH = 0.4
# How far beyond the roots of the smallest and the largest eigenvalue, in log t: exp(-24) and exp(-2 * 8) are left.
_BELOW, _ABOVE = 24.0, 8.0
# At t = 0 less than this of 1 is taken for nothing, whatever the eigenvalues' rounding.
_LEAST_REST = 1e-7


class Full:
    """``|m - m_r|^2 + tr C + tr C_r - 2 tr (C_r^1/2 C C_r^1/2)^1/2``; a covariance is ``[d, d]``."""

    def __init__(self, mean: Tensor, covariance: Tensor) -> None:
        self.mean = mean
        self._trace = covariance.trace()
        values, vectors = torch.linalg.eigh(covariance)
        kept = _positive(values)
        # Any L with L L^T = C_r serves as C_r^1/2: the eigenvalues of L^T C L are the same.
        self._root = vectors[:, kept] * values[kept].sqrt()

    def of(self, rows: Tensor) -> Tensor:
        """The sum of the rows' outer products."""
        return rows.T @ rows

    def trace(self, covariance: Tensor) -> Tensor:
        return covariance.trace()

    def distance(self, mean: Tensor, covariance: Tensor) -> Tensor:
        return (mean - self.mean).square().sum() + covariance.trace() + self._trace - 2 * self._root_trace(covariance)

    def root_change(self, covariance: Tensor, added: Tensor, removed: Tensor) -> Tensor:
        """What tr (C_r^1/2 C C_r^1/2)^1/2 becomes more, ``[N]``, for C + ``added`` - u u^T, u each of ``removed``.

        With A = L^T (C + added) L = V diag(a) V^T and w = V^T L^T u, exactly::

            tr (A - L^T u u^T L)^1/2 - tr A^1/2 = 1/pi Integral_0^inf log(1 - sum_k w_k^2 / (a_k + t^2)) dt

        by A^1/2 = 1/pi Integral A (A + s)^-1 s^-1/2 ds, the determinant of a rank-one change, parts, and s = t^2. All
        samples share one eigendecomposition and the trapezoids' nodes.

        What ``added`` adds is exact too, though all samples share it: with B = L^T C L = U diag(b) U^T and D = A - B,
        ``(A^1/2 - B^1/2)_kl = (V^T D U)_kl / (a_k^1/2 + b_l^1/2)`` in these bases, since A^1/2 X + X B^1/2 = D for that
        difference X. Two traces of roots, subtracted, would have the rounding of the whole.
        """
        values, vectors = torch.linalg.eigh(self._root.T @ (covariance + added) @ self._root)
        kept = _positive(values)
        values = values[kept]
        if not len(values):
            return removed.new_zeros(len(removed))
        vectors = vectors[:, kept]
        # What w has in directions without variance is rounding: no sample lies there.
        squares = (removed @ (self._root @ vectors)).square()
        change: Tensor = self._shared_change(covariance, added, values, vectors) + _integral(squares, values)
        return change

    def _shared_change(self, covariance: Tensor, added: Tensor, values: Tensor, vectors: Tensor) -> Tensor:
        """tr A^1/2 - tr B^1/2, from a and V."""
        before, others = torch.linalg.eigh(self._root.T @ covariance @ self._root)
        difference = vectors.T @ (self._root.T @ added @ self._root) @ others
        roots = values.sqrt()[:, None] + before.clamp(min=0).sqrt()
        change: Tensor = (difference / roots * (vectors.T @ others)).sum()
        return change

    def _root_trace(self, covariance: Tensor) -> Tensor:
        values = torch.linalg.eigvalsh(self._root.T @ covariance @ self._root)
        trace: Tensor = values[_positive(values)].sqrt().sum()
        return trace


def _positive(values: Tensor) -> Tensor:
    """Which eigenvalues are more than the rounding of the largest."""
    if not len(values):
        return values > 0
    return values > values.amax().clamp(min=0) * len(values) * torch.finfo(values.dtype).eps


def _integral(squares: Tensor, values: Tensor) -> Tensor:
    """1/pi Integral_0^inf log(1 - sum_k squares_k / (values_k + t^2)) dt, ``[N]``."""
    nodes, weights = _nodes(values)
    inverse = (values[:, None] + nodes.square()).reciprocal()
    shares = squares @ inverse
    # Where little of 1 is left its digits are lost, and nothing is at t = 0 where a sample alone spans a direction. So
    # what is left there counts from the rounding of the eigenvalues on, and what t adds to it is a sum.
    rounding = (torch.finfo(values.dtype).eps * 10 * values.amax() / values.amin()).clamp(max=_LEAST_REST)
    rest = 1 - (squares / values).sum(1, keepdim=True)
    rest = torch.where(rest > rounding, rest, 0) + (squares / values) @ (inverse * nodes.square())
    logs = torch.where(shares < 0.5, torch.log1p(-shares.clamp(max=0.5)), rest.log())
    return logs @ weights / math.pi


def _nodes(values: Tensor) -> tuple[Tensor, Tensor]:
    """t and its weights for an integral over t from 0 to infinity."""
    low, high = (float(0.5 * value.log()) for value in (values.amin(), values.amax()))
    count = math.ceil((high + _ABOVE - low + _BELOW) / _WIDTH) + 1
    logs = torch.arange(count, dtype=values.dtype, device=values.device) * _WIDTH + (low - _BELOW)
    weights = torch.full_like(logs, _WIDTH)
    # The sum of all that follows beyond an end, where the integrand times t falls off like a geometric series.
    weights[0] = weights[-1] = _WIDTH / -math.expm1(-_WIDTH)
    return logs.exp(), weights * logs.exp()
