"""Mean and covariance of the features of a set of images, and the Fréchet distance of two such sets."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from advflow_ext.contract.checks import require_count, require_float_tensor
from advflow_ext.distribution._full import Full
from advflow_ext.distribution._rows import finite_rows, require_features

_FORMAT = "advflow_ext.FeatureMoments 1"
# Of a covariance's largest element: how far from symmetric float32's rounding may leave it.
_ROUNDING = 1e-5


@dataclass(frozen=True, eq=False)
class FeatureMoments:
    """Mean ``[d]``, covariance ``[d, d]`` (of N, not N - 1) and count of a set's features, all sums in float64.

    A set may come in parts::

        moments = af.FeatureMoments.of(first, extractor="inception_v3 pool", preprocessing="299 px, antialias")
        moments = moments + af.FeatureMoments.of(second, extractor=..., preprocessing=...)
        moments.save("reference.safetensors")

    ``extractor`` and ``preprocessing`` are words of yours for how images became features. Moments whose words differ
    are neither joined nor compared: how an image is resized alone moves FID (arXiv 2104.11222).
    ``dropped`` counts the rows that were left out because they are not finite, or so large that their squares add up to
    more than float32 holds.

    Statistics that another tool has saved become one by ``FeatureMoments(mean, covariance, count)``; of a covariance of
    N - 1 take (N - 1) / N.

    Raises ValueError for shapes that do not belong together, a count below 1, numbers that are not finite, and a
    covariance that is not symmetric or has a negative variance.
    """

    mean: Tensor
    covariance: Tensor
    count: int
    extractor: str = ""
    preprocessing: str = ""
    dropped: int = 0

    def __post_init__(self) -> None:
        require_features("covariance", self.covariance)
        width = self.covariance.shape[0]
        if self.covariance.shape != (width, width):
            raise ValueError(f"covariance has shape {list(self.covariance.shape)}; accepted is [d, d].")
        require_float_tensor("mean", self.mean)
        if self.mean.shape != (width,) or self.mean.device != self.covariance.device:
            raise ValueError(
                f"mean has shape {list(self.mean.shape)} on {self.mean.device}; accepted is [{width}] on "
                f"{self.covariance.device}, as the covariance says."
            )
        require_count("count", self.count, 1)
        require_count("dropped", self.dropped, 0)
        for name in ("extractor", "preprocessing"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name} is {getattr(self, name)!r}; accepted is a string.")
        for name in ("mean", "covariance"):
            object.__setattr__(self, name, getattr(self, name).detach().double())
            if not getattr(self, name).isfinite().all():
                raise ValueError(f"{name} holds numbers that are not finite; accepted are finite ones.")
        self._require_covariance()

    def _require_covariance(self) -> None:
        off = (self.covariance - self.covariance.T).abs().amax()
        if off > _ROUNDING * self.covariance.abs().amax():
            raise ValueError(f"covariance differs from its transpose by {off.item():.3g}; accepted is a symmetric one.")
        least = self.covariance.diagonal().amin()
        if least < 0:
            raise ValueError(f"covariance has {least.item():.3g} on its diagonal; accepted are variances, at least 0.")

    @staticmethod
    @torch.no_grad()
    def of(features: Tensor, *, extractor: str = "", preprocessing: str = "") -> FeatureMoments:
        """Of features ``[N, d]``, N at least 1. Rows that count as not finite are left out, see ``dropped``.

        Raises ValueError for anything else, and where no row is finite.
        """
        require_features("features", features)
        rows, finite = finite_rows(features)
        count = int(finite.sum())
        if not count:
            raise ValueError(
                f"features has {len(rows)} rows, none of them finite; accepted is at least one finite row."
            )
        mean = rows.sum(0) / count
        centred = torch.where(finite, rows - mean, 0)
        return FeatureMoments(mean, centred.T @ centred / count, count, extractor, preprocessing, len(rows) - count)

    def __add__(self, other: FeatureMoments) -> FeatureMoments:
        """Of both sets together, by their sums. Raises ValueError where features are not those of one extractor."""
        require_same_path(self, other)
        count = self.count + other.count
        share, delta = other.count / count, other.mean - self.mean
        covariance = (1 - share) * self.covariance + share * other.covariance
        covariance = covariance + share * (1 - share) * torch.outer(delta, delta)
        dropped = self.dropped + other.dropped
        return FeatureMoments(self.mean + share * delta, covariance, count, self.extractor, self.preprocessing, dropped)

    def to(self, device: torch.device | str) -> FeatureMoments:
        """The same on another device."""
        mean, covariance = self.mean.to(device), self.covariance.to(device)
        return FeatureMoments(mean, covariance, self.count, self.extractor, self.preprocessing, self.dropped)

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file, which needs the package of that name."""
        save_file = _safetensors().save_file
        words = {"format": _FORMAT, "extractor": self.extractor, "preprocessing": self.preprocessing}
        words |= {"count": str(self.count), "dropped": str(self.dropped)}
        tensors = {"mean": self.mean.contiguous(), "covariance": self.covariance.contiguous()}
        save_file(tensors, path, metadata=words)

    @staticmethod
    def load(path: str | Path) -> FeatureMoments:
        """What :meth:`save` wrote, on the CPU. Raises ValueError for another file."""
        with _safetensors().safe_open(path, framework="pt") as file:
            words = file.metadata() or {}
            if words.get("format") != _FORMAT:
                raise ValueError(f"{path} holds {words.get('format')!r}; accepted is what FeatureMoments.save wrote.")
            mean, covariance = file.get_tensor("mean"), file.get_tensor("covariance")
        count, dropped = int(words["count"]), int(words["dropped"])
        return FeatureMoments(mean, covariance, count, words["extractor"], words["preprocessing"], dropped)


@torch.no_grad()
def frechet_distance(first: FeatureMoments, second: FeatureMoments) -> Tensor:
    """The Fréchet distance of two sets of features, FID where they are Inception's, float64 []::

        |m_1 - m_2|^2 + tr C_1 + tr C_2 - 2 tr (C_2^1/2 C_1 C_2^1/2)^1/2

    with covariances C of N - 1, as mseitzer/pytorch-fid and torch-fidelity have them. arXiv 1706.08500, eq. 6.

    Raises ValueError for features of two extractors, on two devices, and for a set of one image.
    """
    require_same_path(first, second)
    for name, moments in (("first", first), ("second", second)):
        if moments.count < 2:
            raise ValueError(f"{name} has a count of 1; accepted is at least 2, since one image has no covariance.")
    covariance, other = (each.covariance * (each.count / (each.count - 1)) for each in (first, second))
    return Full(second.mean, other).distance(first.mean, covariance).clamp(min=0)


def require_same_path(first: FeatureMoments, second: FeatureMoments) -> None:
    """Refuses two sets whose images did not become features in the same way."""
    for name in ("extractor", "preprocessing"):
        one, other = getattr(first, name), getattr(second, name)
        if one != other:
            raise ValueError(f"one {name} is {one!r} and the other {other!r}; accepted is one for both sets.")
    if first.mean.shape != second.mean.shape or first.mean.device != second.mean.device:
        shapes = " and ".join(f"{len(each.mean)} features on {each.mean.device}" for each in (first, second))
        raise ValueError(f"the sets have {shapes}; accepted is one number on one device.")


def _safetensors() -> Any:
    """The module, which moments alone need and this package does not require."""
    try:
        return importlib.import_module("safetensors.torch")
    except ImportError:
        raise ImportError(
            "a file of FeatureMoments needs safetensors, which is not installed: pip install safetensors."
        ) from None
