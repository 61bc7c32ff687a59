"""Weights and inputs that are the same whatever fills them in: formulas of a place's number, no generator's stream."""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import Tensor, nn

# Tiny shapes of the same classes, told to theirs and to ours in either's words.
LLAMAGEN: dict[str, dict[str, Any]] = {
    "class": {"layers": 2, "heads": 2, "width": 32, "tokens": 16, "vocabulary": 48, "classes": 5, "multiple": 16},
    "text": {
        "layers": 2, "heads": 2, "width": 32, "tokens": 16, "vocabulary": 48, "multiple": 16,
        "condition": "text", "text_tokens": 4, "text_width": 12,
    },
}  # fmt: skip
MINGPT = {"layers": 2, "heads": 2, "width": 32, "tokens": 16, "vocabulary": 48, "places": 20}
VQ: dict[str, dict[str, Any]] = {
    "llamagen": {"codes": 64, "channels": 32, "multipliers": (1, 2, 2), "blocks": 2, "latent_channels": 16},
    "taming": {
        "codes": 64, "channels": 32, "multipliers": (1, 2, 2), "blocks": 1, "latent_channels": 16,
        "code_width": 16, "normalized": False, "names": "taming",
    },
}  # fmt: skip
GUIDANCE = 1.5


def numbers(name: str, shape: tuple[int, ...], scale: float = 1.0) -> Tensor:
    """Numbers in [-scale, scale) that look random and depend on `name` and their places alone."""
    count = 1
    for size in shape:
        count *= size
    start = zlib.crc32(name.encode()) % 9973
    places = torch.arange(count, dtype=torch.float64) + start
    return ((places * 12.9898).sin() * 43758.5453).frac().reshape(shape).float() * scale


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """Gives every parameter and buffer numbers of its own; norms stay near 1."""
    for name, tensor in model.state_dict().items():
        if tensor.dim() == 1 and name.endswith("weight"):
            tensor.copy_(1 + numbers(name, tensor.shape, 0.2))
        elif tensor.is_floating_point() and not name.endswith(("mask", "codebook_used")):
            tensor.copy_(numbers(name, tensor.shape, 0.1 if tensor.dim() == 1 else 0.3))


def tokens(name: str, rows: int, length: int, below: int) -> Tensor:
    return ((numbers(name, (rows, length)) + 1) / 2 * below).long().clamp(0, below - 1)


def labels() -> Tensor:
    return torch.tensor([3, 0, 4])


def text() -> tuple[Tensor, Tensor]:
    """Features [3, 4, 12] and which places hold a word; padded on the left, as LlamaGen's sampler has them."""
    words = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 1]], dtype=torch.bool)
    return numbers("text", (3, 4, 12), 2.0) * words[:, :, None], words


def images() -> Tensor:
    return numbers("images", (2, 3, 16, 16))
