"""The VQ tokenizers of LlamaGen and of taming-transformers: one network, under the names that either publishes."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from math import isqrt
from typing import Any, Literal, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class VQConfig:
    """The shape of a VQ tokenizer, LlamaGen's VQ-16 by default.

    Args:
        codes: of the codebook.
        code_width: of a code.
        normalized: whether latents and codes count by their direction alone.
        channels: at full resolution, times `multipliers` at every lower one.
        multipliers: one a resolution; each further one halves it.
        blocks: residual blocks a resolution, one more in the decoder.
        latent_channels: before they become the width of a code.
        groups: of channels that are normalised together.
        names: whose names the parameters have.
    """

    codes: int = 16384
    code_width: int = 8
    normalized: bool = True
    channels: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks: int = 2
    latent_channels: int = 256
    groups: int = 32
    names: Literal["llamagen", "taming"] = "llamagen"

    def __post_init__(self) -> None:
        if self.names not in _NAMES:
            raise ValueError(f"names is {self.names!r}; accepted: {', '.join(map(repr, _NAMES))}")
        widths = [self.channels * multiplier for multiplier in self.multipliers]
        if not widths or any(width % self.groups for width in widths):
            raise ValueError(f"channels are {widths} with groups of {self.groups}; accepted: multiples of groups")

    @property
    def downsampling(self) -> int:
        """Pixels a side of what one token stands for."""
        return int(2 ** (len(self.multipliers) - 1))


class _Names(NamedTuple):
    down: str
    up: str
    block: str
    middle: tuple[str, str, str]
    up_from_zero: bool  # whether the decoder counts from where it begins, or from full resolution


_NAMES = {
    "llamagen": _Names("conv_blocks", "conv_blocks", "res", ("0", "1", "2"), True),
    "taming": _Names("down", "up", "block", ("block_1", "attn_1", "block_2"), False),
}


VQ_16 = VQConfig()
VQ_8 = VQConfig(multipliers=(1, 2, 2, 4))
TAMING_F16 = VQConfig(code_width=256, normalized=False, names="taming")
"""`vqgan_imagenet_f16_16384`; `vqgan_imagenet_f16_1024` has 1024 codes."""


class VQModel(nn.Module):
    """Images [B, 3, H, W] in [-1, 1] to tokens [B, T], row by row, and back.

    Diffusers' VQModel has other names and no codes that count by their direction.
    """

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = Codebook(config)
        self.quant_conv = nn.Conv2d(config.latent_channels, config.code_width, 1)
        self.post_quant_conv = nn.Conv2d(config.code_width, config.latent_channels, 1)

    def latents(self, images: Tensor) -> Tensor:
        """What is closest to which code, [B, code_width, h, w]; of length 1 where codes are."""
        latents: Tensor = self.quant_conv(self.encoder(images))
        return F.normalize(latents, dim=1) if self.config.normalized else latents

    def encode(self, images: Tensor) -> Tensor:
        tokens: Tensor = self.quantize.nearest(self.latents(images))
        return tokens

    def lookup(self, tokens: Tensor) -> Tensor:
        """Codes [B, code_width, h, w] of the tokens of square images."""
        side = isqrt(tokens.shape[1])
        if side * side != tokens.shape[1]:
            raise ValueError(f"tokens has {tokens.shape[1]} an image; accepted: those of a square image")
        codes: Tensor = F.embedding(tokens, self.quantize.codes).unflatten(1, (side, side)).movedim(3, 1)
        return codes

    def decode(self, tokens: Tensor) -> Tensor:
        return self.decode_latents(self.lookup(tokens))

    def decode_latents(self, latents: Tensor) -> Tensor:
        images: Tensor = self.decoder(self.post_quant_conv(latents))
        return images


class Codebook(nn.Module):
    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self._normalized = config.normalized
        self.embedding = nn.Embedding(config.codes, config.code_width)
        nn.init.uniform_(self.embedding.weight, -1 / config.codes, 1 / config.codes)

    @property
    def codes(self) -> Tensor:
        weight = self.embedding.weight
        return F.normalize(weight, dim=1) if self._normalized else weight

    def nearest(self, latents: Tensor) -> Tensor:
        """Tokens [B, h * w] of latents [B, C, h, w]."""
        flat, codes = latents.movedim(1, 3).flatten(1, 2), self.codes
        return (codes.square().sum(1) - 2 * flat @ codes.T).argmin(2)

    def _load_from_state_dict(self, state: OrderedDict[str, Tensor], prefix: str, *rest: Any) -> None:
        state.pop(f"{prefix}codebook_used", None)  # LlamaGen's training counts in it
        super()._load_from_state_dict(state, prefix, *rest)


class Encoder(nn.Module):
    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        names, widths = _NAMES[config.names], _widths(config)
        self._levels = names.down
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        last = len(widths) - 1
        levels = [
            Level(config, widths[max(i - 1, 0)], widths[i], config.blocks, i == last, None if i == last else "down")
            for i in range(len(widths))
        ]
        self.add_module(names.down, nn.ModuleDict({str(i): level for i, level in enumerate(levels)}))
        self.mid = _middle(config, widths[-1])
        self.norm_out = _norm(config, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.latent_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        h = self.conv_in(images)
        for level in getattr(self, self._levels).values():
            h = level(h)
        latents: Tensor = self.conv_out(F.silu(self.norm_out(self.mid(h))))
        return latents


class Decoder(nn.Module):
    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        names, widths = _NAMES[config.names], _widths(config)
        self._levels = names.up
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.mid = _middle(config, widths[-1])
        last = len(widths) - 1
        levels = OrderedDict()
        for i in reversed(range(len(widths))):
            level = Level(
                config, widths[min(i + 1, last)], widths[i], config.blocks + 1, i == last, "up" if i else None
            )
            levels[str(last - i if names.up_from_zero else i)] = level
        self.add_module(names.up, nn.ModuleDict(levels))
        self.norm_out = _norm(config, widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        h = self.mid(self.conv_in(latents))
        for level in getattr(self, self._levels).values():
            h = level(h)
        images: Tensor = self.conv_out(F.silu(self.norm_out(h)))
        return images


class Level(nn.Module):
    """One resolution: residual blocks, attention after each at the lowest, and the way to the next."""

    def __init__(
        self,
        config: VQConfig,
        before: int,
        width: int,
        blocks: int,
        attention: bool,
        to_next: Literal["down", "up"] | None,
    ) -> None:
        super().__init__()
        self._block = _NAMES[config.names].block
        residual = nn.ModuleList(ResidualBlock(config, before if i == 0 else width, width) for i in range(blocks))
        self.add_module(self._block, residual)
        self.attn = nn.ModuleList(AttentionBlock(config, width) for _ in range(blocks if attention else 0))
        self.downsample = Downsample(width) if to_next == "down" else None
        self.upsample = Upsample(width) if to_next == "up" else None

    def forward(self, h: Tensor) -> Tensor:
        for i, block in enumerate(getattr(self, self._block)):
            h = block(h)
            if self.attn:
                h = self.attn[i](h)
        if self.downsample:
            h = self.downsample(h)
        if self.upsample:
            h = self.upsample(h)
        return h


class ResidualBlock(nn.Module):
    def __init__(self, config: VQConfig, before: int, width: int) -> None:
        super().__init__()
        self.norm1 = _norm(config, before)
        self.conv1 = nn.Conv2d(before, width, 3, padding=1)
        self.norm2 = _norm(config, width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        if before != width:
            self.nin_shortcut = nn.Conv2d(before, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        out: Tensor = (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + h
        return out


class AttentionBlock(nn.Module):
    def __init__(self, config: VQConfig, width: int) -> None:
        super().__init__()
        self.norm = _norm(config, width)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        queries, keys, values = (made(h).flatten(2).mT for made in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(queries, keys, values)
        out: Tensor = x + self.proj_out(mixed.mT.unflatten(2, x.shape[2:]))
        return out


class Downsample(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return out


class Upsample(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


def _widths(config: VQConfig) -> list[int]:
    return [config.channels * multiplier for multiplier in config.multipliers]


def _middle(config: VQConfig, width: int) -> nn.Sequential:
    parts = (ResidualBlock(config, width, width), AttentionBlock(config, width), ResidualBlock(config, width, width))
    return nn.Sequential(OrderedDict(zip(_NAMES[config.names].middle, parts, strict=True)))


def _norm(config: VQConfig, width: int) -> nn.GroupNorm:
    return nn.GroupNorm(config.groups, width, eps=1e-6)
