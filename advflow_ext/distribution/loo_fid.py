"""Leave-one-out FID (arXiv 2603.23086): a reward for what an image does to the distribution it belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

from advflow_ext.contract.checks import require_choice
from advflow_ext.contract.numbers import require_number
from advflow_ext.distribution._diagonal import Diagonal
from advflow_ext.distribution._full import Full
from advflow_ext.distribution._rows import finite_rows, require_features, summed
from advflow_ext.distribution.moments import FeatureMoments

_DISTANCES: dict[str, type[Diagonal] | type[Full]] = {"diagonal": Diagonal, "full": Full}


class _Batch(NamedTuple):
    """A batch's rows on this rank, and the moments of those of all ranks."""

    rows: Tensor
    finite: Tensor  # [N, 1]
    given: int
    usable: int  # of those, the finite ones
    mean: Tensor
    covariance: Tensor


class LeaveOneOutFID:
    """How much the distance of generated images to a reference grows when one of them is left out: positive helps.

    ``reference`` are the moments of real images' features. Each iteration, with features ``[N, d]`` of the images
    drawn, by the extractor and the preprocessing that the reference has::

        distance = af.LeaveOneOutFID(reference)
        rewards = distance.reward(features)    # [N], changes nothing
        distance.update(features)

    Generated images are held as a moving distribution: ``beta`` of its weight stays on what it was, 1 - beta goes in
    equal parts to the batch's images, at the first update all of it. A reward compares that distribution after this
    batch with the same without image i, whose part goes to the others (``ema_loo`` in bugrabaran/ar-policy-tuning
    @fac5b31)::

        reward_i = (FID(without i) - FID(with all)) (N - 1) / (1 - beta)

    and beta counts as 0 before the first update. Without that factor rewards are of the size of (1 - beta) / (N - 1),
    and vanish beside the epsilon of an advantage.

    ``covariance="diagonal"`` is the released distance, |m - m_r|^2 + |s - s_r|^2 with standard deviations s. ``"full"``
    is FID's own, with a covariance matrix: exact too, by two eigendecompositions for all images.
    Both have covariances of N, not N - 1.

    Where torch.distributed is initialised, N and the moments are those of the images of all ranks of ``process_group``
    (``None``: all there are), which then call together, each with the images it has; every rank's rewards are of its
    own. A rank whose features are refused leaves the others waiting. The state lies on the reference's device, in
    float64.

    An image whose features are not finite gets the reward NaN, which ``group_advantages`` leaves out; the others' are
    as if it were absent. So does one whose squared features add up to more than float32 holds, 3.4e38. ``dropped``
    counts those that updates left out, ``updates`` the updates.

    Raises ValueError for a beta outside [0, 1) and an unknown covariance, and in use on a rank outside the group.
    """

    def __init__(
        self,
        reference: FeatureMoments,
        beta: float = 0.5,
        covariance: str = "diagonal",
        process_group: distributed.ProcessGroup | None = None,
    ) -> None:
        if not isinstance(reference, FeatureMoments):
            raise ValueError(f"reference is a {type(reference).__name__}; accepted is an advflow_ext.FeatureMoments.")
        require_number("beta", beta, low=0.0, high=1.0)
        require_choice("covariance", covariance, tuple(_DISTANCES))
        self._distance = _DISTANCES[covariance](reference.mean, reference.covariance)
        self._beta, self._group = float(beta), process_group
        self._words = {"extractor": reference.extractor, "preprocessing": reference.preprocessing}
        self._mean = torch.zeros_like(reference.mean)
        self._covariance = torch.zeros_like(reference.mean if covariance == "diagonal" else reference.covariance)
        self.updates = self.dropped = 0

    @torch.no_grad()
    def reward(self, features: Tensor) -> Tensor:
        """Rewards ``[N]`` of features ``[N, d]``, float64 for float64 features, else float32.

        Raises ValueError for anything else, and for fewer than 2 images on all ranks together. Where fewer than 2 have
        finite features all rewards are NaN.
        """
        batch = self._batch(features)
        if batch.given < 2:
            raise ValueError(
                f"features has {batch.given} rows, of all ranks; accepted is at least 2, since one image left out "
                "leaves none."
            )
        dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
        if batch.usable < 2:
            return torch.full((len(features),), torch.nan, dtype=dtype, device=features.device)
        mean, covariance = self._after(batch)
        # Leaving image i out moves the mean of anything by g times (its mean in the batch - its value in i).
        g = (1 - self._weight_of_old) / (batch.usable - 1)
        shift = batch.mean - mean
        centred = torch.where(batch.finite, batch.rows - mean, 0)
        moved = g * (shift - centred)
        # The covariance without i is covariance + added - u u^T, u = sqrt(g (1 + g)) (centred - g / (1 + g) shift).
        added = g * batch.covariance + g / (1 + g) * self._distance.of(shift[None])
        removed = (g * (1 + g)) ** 0.5 * (centred - g / (1 + g) * shift)

        of_means = (moved * (moved + 2 * (mean - self._distance.mean))).sum(1)
        of_traces = self._distance.trace(added) - removed.square().sum(1)
        of_roots = self._distance.root_change(covariance, added, removed)
        rewards = (of_means + of_traces - 2 * of_roots) / g
        return torch.where(batch.finite[:, 0], rewards, torch.nan).to(dtype)

    @torch.no_grad()
    def update(self, features: Tensor) -> None:
        """Moves the distribution of generated images by features ``[N, d]``.

        Raises ValueError for anything else and for no image on any rank. Where no image has finite features nothing
        moves.
        """
        batch = self._batch(features)
        if not batch.given:
            raise ValueError("features has 0 rows, of all ranks; accepted is at least 1.")
        self.dropped += batch.given - batch.usable
        if batch.usable:
            self._mean, self._covariance = self._after(batch)
            self.updates += 1

    @torch.no_grad()
    def fid(self) -> Tensor:
        """The distance of the moving distribution to the reference, float64 [], with the covariance chosen.

        Raises ValueError before the first update.
        """
        if not self.updates:
            raise ValueError("fid() has no images to measure; accepted is an update() before it.")
        return self._distance.distance(self._mean, self._covariance).clamp(min=0)

    def state_dict(self) -> dict[str, Any]:
        counts = {"updates": self.updates, "dropped": self.dropped}
        return {"mean": self._mean, "covariance": self._covariance, **counts, **self._words}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what :meth:`state_dict` returned, bit for bit.

        Raises ValueError for another's state: of another extractor, preprocessing, covariance or number of features,
        or with numbers that are not finite.
        """
        own = self.state_dict()
        if state.keys() != own.keys():
            raise ValueError(f"state holds {sorted(state)}; accepted are {sorted(own)}.")
        for name, word in self._words.items():
            if state[name] != word:
                raise ValueError(f"state[{name!r}] is {state[name]!r}; accepted is the reference's, {word!r}.")
        for name in ("mean", "covariance"):
            given = list(state[name].shape) if isinstance(state[name], Tensor) else type(state[name]).__name__
            if given != list(own[name].shape):
                raise ValueError(f"state[{name!r}] has shape {given}; accepted is {list(own[name].shape)}, as here.")
            if not state[name].isfinite().all():
                raise ValueError(f"state[{name!r}] holds numbers that are not finite; accepted are finite ones.")
        self._mean, self._covariance = (state[name].to(own[name], copy=True) for name in ("mean", "covariance"))
        self.updates, self.dropped = int(state["updates"]), int(state["dropped"])

    @property
    def _weight_of_old(self) -> float:
        return self._beta if self.updates else 0.0

    def _batch(self, features: Tensor) -> _Batch:
        require_features("features", features, len(self._mean), self._mean.device)
        rows, finite = finite_rows(features)
        counts = torch.stack([finite.new_tensor(len(rows), dtype=rows.dtype), finite.sum(dtype=rows.dtype)])
        sums = summed(torch.cat([counts, rows.sum(0)]), self._group)
        given, usable = (int(number) for number in sums[:2].tolist())
        # From the mean of all ranks' rows: sums of raw squares lose the digits that a small spread has.
        mean = sums[2:] / max(usable, 1)
        covariance = summed(self._distance.of(torch.where(finite, rows - mean, 0)), self._group) / max(usable, 1)
        return _Batch(rows, finite, given, usable, mean, covariance)

    def _after(self, batch: _Batch) -> tuple[Tensor, Tensor]:
        """Mean and covariance once the batch has been taken in."""
        old = self._weight_of_old
        delta = batch.mean - self._mean
        between = old * (1 - old) * self._distance.of(delta[None])
        return batch.mean - old * delta, old * self._covariance + (1 - old) * batch.covariance + between
