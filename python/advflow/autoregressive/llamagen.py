"""LlamaGen's GPT (arXiv 2406.06525), class- and text-conditional, under the names of its published checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import isqrt
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advflow.autoregressive.token_model import Condition, KeyValueCache, Prefix, Text, TokenModel

SIZES = {
    "GPT-B": (12, 12, 768),
    "GPT-L": (24, 16, 1024),
    "GPT-XL": (36, 20, 1280),
    "GPT-XXL": (48, 24, 1536),
    "GPT-XXXL": (48, 40, 2560),
    "GPT-1B": (22, 32, 2048),
    "GPT-3B": (24, 32, 3200),
    "GPT-7B": (32, 32, 4096),
}
"""Layers, heads and width of the models that were published, by their names."""


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a LlamaGen transformer.

    Args:
        layers: transformer blocks.
        heads: attention heads.
        width: of hidden states.
        tokens: of an image, a square number: 256, 576 or 1024 for 256, 384 or 512 px with VQ-16.
        vocabulary: codes of the tokenizer.
        condition: whether it is told a class or a text.
        classes: how many classes there are; the row after them stands for none.
        text_tokens: places a text has.
        text_width: of a text's features.
        multiple: the feed-forward width is rounded up to a multiple of it.
    """

    layers: int
    heads: int
    width: int
    tokens: int = 256
    vocabulary: int = 16384
    condition: Literal["class", "text"] = "class"
    classes: int = 1000
    text_tokens: int = 120
    text_width: int = 2048
    multiple: int = 256

    def __post_init__(self) -> None:
        if self.tokens < 1 or isqrt(self.tokens) ** 2 != self.tokens:
            raise ValueError(f"tokens is {self.tokens}; accepted: a square number, the places of a square grid")
        if self.width % (4 * self.heads):
            raise ValueError(
                f"width is {self.width} with {self.heads} heads; accepted: a multiple of 4 * heads, since half of "
                "each head turns with the row and half with the column"
            )
        if self.condition not in ("class", "text"):
            raise ValueError(f'condition is {self.condition!r}; accepted: "class" or "text"')

    @property
    def prefix(self) -> int:
        """Places before the first image token."""
        return 1 if self.condition == "class" else self.text_tokens


def published(
    size: str, *, tokens: int = 256, condition: Literal["class", "text"] = "class", vocabulary: int = 16384
) -> GPTConfig:
    """The shape of the published model called `size`. Raises ValueError for a name that is not in `SIZES`."""
    if size not in SIZES:
        raise ValueError(f"size is {size!r}; accepted: {', '.join(SIZES)}")
    layers, heads, width = SIZES[size]
    return GPTConfig(layers, heads, width, tokens, vocabulary, condition)


class LlamaGen(TokenModel):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = config.tokens
        embedding = ClassEmbedding if config.condition == "class" else TextEmbedding
        self.cls_embedding: ClassEmbedding | TextEmbedding = embedding(config)
        self.tok_embeddings = nn.Embedding(config.vocabulary, config.width)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=1e-5)
        self.output = nn.Linear(config.width, config.vocabulary, bias=False)

    def prefix(self, condition: Condition) -> Prefix:
        prefix: Prefix = self.cls_embedding(condition)
        return prefix

    def unconditional(self, condition: Condition) -> Condition:
        if isinstance(condition, Text):
            assert isinstance(self.cls_embedding, TextEmbedding)
            return Text(self.cls_embedding.uncond_embedding.expand_as(condition.features), condition.words)
        return torch.full_like(condition, self.config.classes)

    def embed(self, tokens: Tensor) -> Tensor:
        embeddings: Tensor = self.tok_embeddings(tokens)
        return embeddings

    def run(self, x: Tensor, mask: Tensor | None, cache: KeyValueCache | None) -> Tensor:
        config, first = self.config, cache.length if cache else 0
        turn = rotations(isqrt(config.tokens), config.width // config.heads, config.prefix, x.device)
        turn = turn[first : first + x.shape[1]]
        for layer in self.layers:
            x = layer(x, turn, mask, cache)
        states: Tensor = self.norm(x)
        return states

    @property
    def head_weight(self) -> Tensor:
        return self.output.weight


class ClassEmbedding(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(config.classes + 1, config.width)

    def forward(self, labels: Tensor) -> Prefix:
        return Prefix(self.embedding_table(labels)[:, None])


class TextEmbedding(nn.Module):
    uncond_embedding: Tensor

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.cap_proj = TextMLP(config.text_width, config.width)
        start = torch.randn(config.text_tokens, config.text_width) / config.text_width**0.5
        self.register_buffer("uncond_embedding", start)

    def forward(self, text: Text) -> Prefix:
        return Prefix(self.cap_proj(text.features), text.words)


class TextMLP(nn.Module):
    def __init__(self, text_width: int, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(text_width, width, bias=False)
        self.fc2 = nn.Linear(width, width, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(features), approximate="tanh"))
        return out


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.attention = Attention(config, layer)
        self.feed_forward = FeedForward(config)
        self.attention_norm = nn.RMSNorm(config.width, eps=1e-5)
        self.ffn_norm = nn.RMSNorm(config.width, eps=1e-5)

    def forward(self, x: Tensor, turn: Tensor, mask: Tensor | None, cache: KeyValueCache | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), turn, mask, cache)
        out: Tensor = x + self.feed_forward(self.ffn_norm(x))
        return out


class Attention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self._heads, self._layer = config.heads, layer
        self.wqkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.wo = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor, turn: Tensor, mask: Tensor | None, cache: KeyValueCache | None) -> Tensor:
        queries, keys, values = self.wqkv(x).unflatten(2, (3, self._heads, -1)).transpose(1, 3).unbind(2)
        queries, keys = rotate(queries, turn), rotate(keys, turn)
        if cache:
            keys, values = cache.extend(self._layer, keys, values)
        causal = mask is None and x.shape[1] > 1
        mixed = F.scaled_dot_product_attention(queries, keys, values, mask, is_causal=causal)
        out: Tensor = self.wo(mixed.transpose(1, 2).flatten(2))
        return out


class FeedForward(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        width = int(8 * config.width / 3)
        width = -(-width // config.multiple) * config.multiple
        self.w1 = nn.Linear(config.width, width, bias=False)
        self.w3 = nn.Linear(config.width, width, bias=False)
        self.w2 = nn.Linear(width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.w2(F.silu(self.w1(x)) * self.w3(x))
        return out


@cache
@torch.inference_mode(False)  # or what sampling has made first could not be trained with
def rotations(side: int, head_width: int, prefix: int, device: torch.device) -> Tensor:
    """Cosines and sines [prefix + side^2, D/2, 2]: half of a head turns with the row, half with the column.

    A prefix has zeros, and with them queries and keys of zero: the published models were trained so.
    """
    half = head_width // 2
    speeds = 1 / 10000 ** (torch.arange(0, half, 2).float() / half)
    angles = torch.outer(torch.arange(side), speeds)
    rows, columns = angles[:, None].expand(-1, side, -1), angles[None].expand(side, -1, -1)
    grid = torch.cat([rows, columns], dim=2).flatten(0, 1)
    turns = torch.stack([grid.cos(), grid.sin()], dim=2)
    return torch.cat([torch.zeros(prefix, *turns.shape[1:]), turns]).to(device)


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Neighbouring elements of x [B, heads, n, D] as the parts of a complex number, by `turn` [n, D/2, 2]."""
    real, imaginary = x.float().unflatten(3, (-1, 2)).unbind(4)
    cos, sin = turn.unbind(2)
    turned = torch.stack([real * cos - imaginary * sin, imaginary * cos + real * sin], dim=4)
    return turned.flatten(3).to(x.dtype)
