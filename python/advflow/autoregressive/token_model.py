"""What every autoregressive model here is: a prefix made of the condition, then image tokens, one after another."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Text(NamedTuple):
    """Features of texts, [B, L, C], and which of their places hold a word, bool [B, L]."""

    features: Tensor
    words: Tensor


Condition = Tensor | Text
"""Labels [B], a text, or tokens [B, L]: what the model in question is conditioned on."""


class Hidden(NamedTuple):
    """Hidden states [B, T, H] that predict T tokens, and the head [V, H] by which they do."""

    states: Tensor
    head: Tensor


class Prefix(NamedTuple):
    """Embeddings [B, P, H] before the first image token, and which of them later places may see, bool [B, P] or all."""

    embeddings: Tensor
    visible: Tensor | None = None


class KeyValueCache:
    """Keys and values of all layers, for sequences of at most `capacity` places.

    Transformers' DynamicCache would copy everything it holds for every token.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Adds keys and values [B, heads, n, D] of new places; all there are then. `length` is the caller's to move."""
        if layer not in self._layers:
            shape = (*keys.shape[:2], self.capacity, keys.shape[3])
            self._layers[layer] = keys.new_empty(shape), values.new_empty(shape)
        end = self.length + keys.shape[2]
        held = self._layers[layer]
        for tensor, new in zip(held, (keys, values), strict=True):
            tensor[:, :, self.length : end] = new
        return held[0][:, :, :end], held[1][:, :, :end]


class TokenModel(nn.Module):
    """A causal transformer over image tokens. `forward` scores, `start` and `advance` are the steps of drawing.

    There is no dropout, nor is a condition ever dropped: old and new log-probabilities are of one policy.
    """

    tokens: int
    """How many tokens an image has."""

    def prefix(self, condition: Condition) -> Prefix:
        raise NotImplementedError

    def unconditional(self, condition: Condition) -> Condition:
        """The condition that says nothing, in as many rows, for classifier-free guidance."""
        raise NotImplementedError

    def embed(self, tokens: Tensor) -> Tensor:
        raise NotImplementedError

    def run(self, x: Tensor, mask: Tensor | None, cache: KeyValueCache | None) -> Tensor:
        """Normalised hidden states of embeddings [B, n, H], the places after those that the cache holds.

        `mask`, bool [B, 1, n, all places], is what may be seen; None stands for all up to a place itself.
        """
        raise NotImplementedError

    @property
    def head_weight(self) -> Tensor:
        raise NotImplementedError

    def forward(self, condition: Condition, tokens: Tensor) -> Hidden:
        """States that predict every one of `tokens` [B, T], each told of those before it alone."""
        embeddings, visible = self.prefix(condition)
        x = torch.cat([embeddings, self.embed(tokens[:, :-1])], dim=1)
        states = self.run(x, _causal_mask(visible, x.shape[1]), None)
        return Hidden(states[:, embeddings.shape[1] - 1 :], self.head_weight)

    def start(self, condition: Condition) -> tuple[Tensor, KeyValueCache, Tensor | None]:
        """States [B, H] that predict the first token, and what `advance` has to be given besides it."""
        embeddings, visible = self.prefix(condition)
        cache = KeyValueCache(embeddings.shape[1] + self.tokens)
        states = self.run(embeddings, _causal_mask(visible, embeddings.shape[1]), cache)
        cache.length = embeddings.shape[1]
        return states[:, -1], cache, visible

    def advance(self, tokens: Tensor, cache: KeyValueCache, visible: Tensor | None) -> Tensor:
        """States [B, H] that predict the token after `tokens` [B]."""
        mask = None
        if visible is not None:
            drawn = visible.new_ones(len(visible), cache.length + 1 - visible.shape[1])
            mask = torch.cat([visible, drawn], dim=1)[:, None, None]
        states = self.run(self.embed(tokens[:, None]), mask, cache)
        cache.length += 1
        return states[:, -1]


def _causal_mask(visible: Tensor | None, length: int) -> Tensor | None:
    """[B, 1, length, length]: each place sees itself, and of those before it what is visible."""
    if visible is None:
        return None
    columns = visible.new_ones(len(visible), length)
    columns[:, : visible.shape[1]] = visible
    square = visible.new_ones(length, length)
    return ((square.tril() & columns[:, None]) | square.diag().diag_embed())[:, None]
