"""Prompts as what the policies are told: in memory, on disk, or encoded whenever they are asked for."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from advflow.core.ranks import Ranks
from advflow.models.embedding_cache import EmbeddingCache
from advflow.models.family import TEXTS_AT_A_TIME, LoadedModel
from advflow.samplers.sampling import Conditioning

IN_MEMORY_AT_MOST = 2048  # of 205 tokens of 4,096 numbers in bfloat16 this many take about 3.5 GB


class Encoder:
    """Encodes prompts with the text encoders of `model`, to which it and what `on_demand` returns alone hold on.

    `folder` is where embeddings are kept; None: in memory where they are few, else in the user's cache.
    """

    def __init__(self, model: LoadedModel, folder: str | None, device: torch.device, ranks: Ranks) -> None:
        self._model, self._device, self._ranks = model, device, ranks
        self._folder = None if folder is None else Path(folder)
        self._cache: EmbeddingCache | None = None
        if folder is not None and model.stored is None:
            raise ValueError(
                f"data.embeddings_cache is {folder!r}; accepted with a model family that has no stored form of its "
                "embeddings is null"
            )

    def __call__(self, texts: Sequence[str], field: str) -> Conditioning:
        """What the policies are told of `texts`, by their places; `field` is the setting that they come from."""
        stored, few = self._model.stored, len(texts) <= IN_MEMORY_AT_MOST
        if stored is None:
            return self._model.encode(texts) if few else OnDemand(self._model.encode, texts)
        if few and self._folder is None:
            starts = range(0, len(texts), TEXTS_AT_A_TIME)
            parts = [self._rows(texts[start : start + TEXTS_AT_A_TIME]) for start in starts]
            return stored.conditioning({name: torch.cat([part[name] for part in parts]) for name in parts[0]})
        if self._cache is None:
            self._cache = EmbeddingCache(self._folder or user_cache(), stored.identity())
        self._cache.fill(texts, self._rows, field, self._ranks)
        return OnDisk(self._cache, stored.conditioning, texts, self._device)

    def _rows(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Always made in a batch of the same size, since rounding may depend on it: a text's bits are its own."""
        assert self._model.stored is not None
        batch = [*texts, *[texts[-1]] * (TEXTS_AT_A_TIME - len(texts))]
        return {
            name: rows[: len(texts)] for name, rows in self._model.stored.tensors(self._model.encode(batch)).items()
        }


class OnDemand:
    """Encodes what is asked for, each time."""

    def __init__(self, encode: Callable[[Sequence[str]], Conditioning], texts: Sequence[str]) -> None:
        self._encode, self._texts = encode, texts

    def __getitem__(self, index: torch.Tensor | slice) -> Any:
        return self._encode(_chosen(self._texts, index))

    def __len__(self) -> int:
        return len(self._texts)


class OnDisk:
    """Reads what is asked for."""

    def __init__(
        self,
        cache: EmbeddingCache,
        conditioning: Callable[[dict[str, torch.Tensor]], Conditioning],
        texts: Sequence[str],
        device: torch.device,
    ) -> None:
        self._cache, self._conditioning, self._texts, self._device = cache, conditioning, texts, device

    def __getitem__(self, index: torch.Tensor | slice) -> Any:
        tensors = self._cache.read(_chosen(self._texts, index))
        return self._conditioning({name: tensor.to(self._device) for name, tensor in tensors.items()})

    def __len__(self) -> int:
        return len(self._texts)


def _chosen(texts: Sequence[str], index: torch.Tensor | slice) -> list[str]:
    return list(texts[index]) if isinstance(index, slice) else [texts[i] for i in index.tolist()]


def user_cache() -> Path:
    """The folder for embeddings that no setting names."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(given) if os.path.isabs(given) else Path.home() / ".cache") / "advflow" / "embeddings"
