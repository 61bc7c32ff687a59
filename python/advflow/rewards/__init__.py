"""Rewards: what scores the images of a run.

A reward is any class with the two methods of `Reward`, made without arguments. "embedded" and "pickscore" are built
in; "package.module:Class" names your own.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Protocol

import torch

_BUILT_IN = {
    "embedded": "advflow.rewards.embedded:EmbeddedReward",
    "pickscore": "advflow.rewards.pickscore:PickScore",
}


@dataclass(frozen=True)
class Scores:
    """Per image, both [B] fp32 on the CPU: `reward` is what training maximises, `score` what evaluation reports."""

    reward: torch.Tensor
    score: torch.Tensor


class Reward(Protocol):
    def __call__(self, images: torch.Tensor, prompts: list[str]) -> Scores:
        """Scores `images`, fp32 [B, 3, H, W] in [0, 1], each against the prompt at the same place."""
        ...

    def category(self, prompt: str) -> str:
        """The group under which evaluation reports this prompt."""
        ...


def load_reward(name: str) -> Reward:
    """Makes the reward called `name`; raises ValueError where there is none."""
    path = _BUILT_IN.get(name, name)
    module_name, _, class_name = path.partition(":")
    if not class_name:
        known = ", ".join(repr(k) for k in _BUILT_IN)
        raise ValueError(f'data.reward is {name!r}; accepted: {known} or a dotted path "package.module:Class"')
    try:
        reward: Reward = getattr(importlib.import_module(module_name), class_name)()
    except (ImportError, AttributeError) as error:
        raise ValueError(f"data.reward {name!r} cannot be loaded: {error}") from error
    return reward
