"""The minGPT-style transformer of taming-transformers (arXiv 2012.09841), under the names of its checkpoints."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advflow.autoregressive.token_model import Condition, KeyValueCache, Prefix, TokenModel


@dataclass(frozen=True)
class MinGPTConfig:
    """The shape of a minGPT.

    Args:
        layers: transformer blocks.
        heads: attention heads.
        width: of hidden states.
        tokens: of an image.
        vocabulary: codes of the tokenizer, in which conditions are written too.
        places: that positions were learnt for, those of the condition included.
    """

    layers: int
    heads: int
    width: int
    tokens: int = 256
    vocabulary: int = 16384
    places: int = 512

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width is {self.width} with {self.heads} heads; accepted: a multiple of heads")
        if self.places < self.tokens:
            raise ValueError(f"places is {self.places} with {self.tokens} tokens; accepted: at least as many")


class MinGPT(TokenModel):
    """Conditions are tokens [B, L]: a class is one, a depth map as many as an image has. None says nothing."""

    def __init__(self, config: MinGPTConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = config.tokens
        self.tok_emb = nn.Embedding(config.vocabulary, config.width)
        self.pos_emb = nn.Parameter(torch.zeros(1, config.places, config.width))
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.ln_f = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)

    def prefix(self, condition: Condition) -> Prefix:
        return Prefix(self.tok_emb(condition))

    def unconditional(self, condition: Condition) -> Condition:
        raise ValueError("guidance is not 1; accepted is 1 alone, since no minGPT was trained without its condition")

    def embed(self, tokens: Tensor) -> Tensor:
        embeddings: Tensor = self.tok_emb(tokens)
        return embeddings

    def run(self, x: Tensor, mask: Tensor | None, cache: KeyValueCache | None) -> Tensor:
        first = cache.length if cache else 0
        x = x + self.pos_emb[:, first : first + x.shape[1]]
        for block in self.blocks:
            x = block(x, mask, cache)
        states: Tensor = self.ln_f(x)
        return states

    @property
    def head_weight(self) -> Tensor:
        return self.head.weight


class Block(nn.Module):
    def __init__(self, config: MinGPTConfig, layer: int) -> None:
        super().__init__()
        self.ln1 = nn.LayerNorm(config.width)
        self.ln2 = nn.LayerNorm(config.width)
        self.attn = Attention(config, layer)
        wide = 4 * config.width
        self.mlp = nn.Sequential(nn.Linear(config.width, wide), nn.GELU(), nn.Linear(wide, config.width))

    def forward(self, x: Tensor, mask: Tensor | None, cache: KeyValueCache | None) -> Tensor:
        x = x + self.attn(self.ln1(x), mask, cache)
        out: Tensor = x + self.mlp(self.ln2(x))
        return out


class Attention(nn.Module):
    def __init__(self, config: MinGPTConfig, layer: int) -> None:
        super().__init__()
        self._heads, self._layer = config.heads, layer
        self.key = nn.Linear(config.width, config.width)
        self.query = nn.Linear(config.width, config.width)
        self.value = nn.Linear(config.width, config.width)
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, mask: Tensor | None, cache: KeyValueCache | None) -> Tensor:
        queries, keys, values = (
            made(x).unflatten(2, (self._heads, -1)).transpose(1, 2) for made in (self.query, self.key, self.value)
        )
        if cache:
            keys, values = cache.extend(self._layer, keys, values)
        causal = mask is None and x.shape[1] > 1
        mixed = F.scaled_dot_product_attention(queries, keys, values, mask, is_causal=causal)
        out: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return out

    def _load_from_state_dict(self, state: OrderedDict[str, Tensor], prefix: str, *rest: Any) -> None:
        state.pop(f"{prefix}mask", None)  # checkpoints hold the causal mask of every layer
        super()._load_from_state_dict(state, prefix, *rest)
