"""What is learnt from image tokens, and what keeps a policy that learns from them from narrowing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from advflow.settings.numbers import require


@dataclass
class TokensConfig:
    """How the tokens of a rollout are learnt from.

    Args:
        epochs: how often a rollout's images are learnt from; 2 in the released trainer.
    """

    epochs: int = 1

    def __post_init__(self) -> None:
        require(self.epochs >= 1, "tokens.epochs", self.epochs, "1 or more")


@dataclass
class EntropyConfig:
    """The weight of the entropy of tokens in the loss, by how far that entropy is from a target.

    Args:
        weight: before it adapts; 0: no such term. 2.2e-3 in the released trainer. In the first twentieth of a run it
            rises from 0, in the last 15 % it falls back.
        least: it never falls below; 7e-5 there.
        most: nor rises above; 4e-3 there.
        target: share of the largest entropy there is, the logarithm of the vocabulary; .78 there. null: what the first
            iteration has.
        deadband: so far from the target nothing adapts; .015 there.
        gain: beyond, the weight is multiplied by exp(gain (target - entropy)); 3 there.
    """

    weight: float = 0.0
    least: float = 7e-5
    most: float = 4e-3
    target: float | None = None
    deadband: float = 0.015
    gain: float = 3.0

    def __post_init__(self) -> None:
        require(self.weight >= 0, "entropy.weight", self.weight, "zero or a positive number")
        require(self.least >= 0, "entropy.least", self.least, "zero or a positive number")
        require(self.most >= 0, "entropy.most", self.most, "entropy.least or more")
        known = self.target is None or 0 < self.target <= 1
        require(known, "entropy.target", self.target, "null, or a number in (0, 1]")
        require(self.deadband >= 0, "entropy.deadband", self.deadband, "zero or a positive number")
        require(self.gain >= 0, "entropy.gain", self.gain, "zero or a positive number")


@dataclass
class LooFIDConfig:
    """Leave-one-out FID as a second advantage; see `advflow_ext.LeaveOneOutFID`.

    Args:
        weight: of it beside the advantage of the reward, each normalised by itself; 0: none. 2 in the released trainer.
        beta: weight that stays on earlier images.
        covariance: "diagonal" (the released trainer's) or "full".
    """

    weight: float = 0.0
    beta: float = 0.5
    covariance: Literal["diagonal", "full"] = "diagonal"

    def __post_init__(self) -> None:
        require(self.weight >= 0, "loo_fid.weight", self.weight, "zero or a positive number")
        require(0 <= self.beta < 1, "loo_fid.beta", self.beta, "a number in [0, 1)")
