"""Classifier-free guidance (arXiv 2207.12598): away from what a policy does when it is told something else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch

from advflow.samplers.sampling import Conditioning


@dataclass(frozen=True)
class Guided:
    """What is `told` of each image, and `untold` [1], of the negative prompt: a conditioning of two passes.

    The velocity is v(untold) + scale (v(told) - v(untold)), diffusers' `guidance_scale`: 1 would be v(told).
    """

    told: Conditioning
    untold: Conditioning
    scale: float

    def __getitem__(self, index: torch.Tensor | slice) -> Guided:
        return Guided(self.told[index], self.untold, self.scale)

    def __len__(self) -> int:
        return len(self.told)

    @cached_property
    def untold_of_each(self) -> Conditioning:
        # Kept, so that policies given one batch share what they make of it.
        return self.untold[torch.zeros(len(self), dtype=torch.int64)]


def guide(told: Conditioning, untold: Conditioning | None, scale: float) -> Conditioning:
    """`told` guided by `scale`; itself where that is 1."""
    if scale == 1:
        return told
    assert untold is not None
    return Guided(told, untold, scale)


def guided(velocity: Callable[[Conditioning], torch.Tensor], conditioning: Conditioning) -> torch.Tensor:
    """The velocity of a conditioning that may be guided; a gradient passes through v(told) alone.

    A guided one is fp32: what is scaled is a difference of two that are nearly equal.
    """
    if not isinstance(conditioning, Guided):
        return velocity(conditioning)
    with torch.no_grad():
        untold = velocity(conditioning.untold_of_each).float()
    return untold + conditioning.scale * (velocity(conditioning.told).float() - untold)
