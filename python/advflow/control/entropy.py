"""The weight of a token policy's entropy, which adapts to how much of it is left."""

from __future__ import annotations

import math
from collections.abc import Mapping

from advflow.settings.tokens import EntropyConfig

_RISEN, _HELD = 0.05, 0.85  # shares of a run


class EntropyControl:
    """Gives the term more weight where entropy is below its target, and less above it.

    The released trainer's controller (bugrabaran/ar-policy-tuning @fac5b31), which looks at the loss that it is about
    to weigh: here it is the iteration before, so that all processes and all of an iteration's updates have one weight.
    `entropy`, as a share of what it can be, and `target` are all the state there is.
    """

    def __init__(self, config: EntropyConfig, iterations: int, vocabulary: int) -> None:
        self._config, self._iterations, self._most = config, iterations, math.log(vocabulary)
        self.entropy: float | None = None
        self.target = config.target

    def state_dict(self) -> dict[str, float | None]:
        return {"entropy": self.entropy, "target": self.target}

    def load_state_dict(self, state: Mapping[str, float | None]) -> None:
        self.entropy = state["entropy"]
        if self._config.target is None:
            self.target = state["target"]

    def weight(self, iteration: int) -> float:
        """In the loss of `iteration`."""
        config = self._config
        if config.weight == 0:
            return 0.0
        weight = config.weight * _schedule(iteration / self._iterations)
        if self.entropy is not None and self.target is not None:
            missing = self.target - self.entropy
            if abs(missing) > config.deadband:
                weight *= math.exp(min(config.gain * missing, 700.0))  # which is where exp ends
        return min(max(weight, config.least), config.most)

    def update(self, mean_entropy: float, iteration: int) -> dict[str, float]:
        """Takes note of an iteration's entropy in nats; returns what belongs into its log."""
        used = self.weight(iteration)
        share = mean_entropy / self._most
        # 0 is what a loss reports that had no usable sample: nothing was measured, so nothing is concluded.
        if share > 0:
            self.entropy = min(share, 1.0)
            self.target = self.entropy if self.target is None else self.target
        return {"entropy_weight": used, "entropy_share": share}


def _schedule(progress: float) -> float:
    """Up, level, and down again like a cosine."""
    if progress < _RISEN:
        return progress / _RISEN
    if progress < _HELD:
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (progress - _HELD) / (1 - _HELD)))
