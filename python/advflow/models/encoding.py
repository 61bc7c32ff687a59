"""Prompts as what the policies are told."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from advflow.samplers.sampling import Conditioning


class PromptEncoder:
    """Conditioning of a list of texts by number: computed once where it fits, else each time it is asked for."""

    PRECOMPUTED_AT_MOST = 2048  # of 205 tokens of 4,096 numbers in bfloat16 this many take about 3.5 GB

    def __init__(
        self, encode: Callable[[Sequence[str]], Conditioning], texts: Sequence[str], device: torch.device
    ) -> None:
        self._texts, self._device = texts, device
        few = len(texts) <= self.PRECOMPUTED_AT_MOST
        self._stored = encode(texts) if few else None
        # Holding on to it keeps the text encoders in memory; they are not needed where all is stored.
        self._encode = None if few else encode

    def __call__(self, numbers: list[int]) -> Conditioning:
        if self._stored is not None:
            return self._stored[torch.tensor(numbers, device=self._device)]
        assert self._encode is not None
        return self._encode([self._texts[i] for i in numbers])
