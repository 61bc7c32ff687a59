"""Where a run's random numbers come from.

Every draw has its own generator, seeded by what it is for and when. There is no generator state to save: a resumed
run draws what the uninterrupted one would have drawn.
"""

from __future__ import annotations

import hashlib

import torch


def generator(seed: int, purpose: str, index: int, device: str | torch.device = "cpu") -> torch.Generator:
    """A generator that depends on (seed, purpose, index) alone."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{index}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def shuffled_parts(count: int, parts: int, seed: int, number: int) -> tuple[torch.Tensor, ...]:
    """The numbers below `count` in an order of the draw's own `number`, cut into so many equal parts."""
    return torch.randperm(count, generator=generator(seed, "split", number)).chunk(parts)
