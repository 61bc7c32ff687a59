"""Keeps the learner from drifting away from the reference, however long a run is."""

from __future__ import annotations

import math

from advflow.config import ReferenceConfig

_GAIN = 0.1  # with _ERROR the constants of the adaptive KL penalty: at most 2 % an iteration
_ERROR = 0.2


class ReferenceControl:
    """Scales the pull towards the reference so that the learner stays within `reference.max_deviation`.

    The adaptive KL penalty of Ziegler et al. (arXiv 1909.08593, section 2.2) with a floor: the scale never falls below
    1, which is the weight that was asked for. `scale` is all its state.
    """

    def __init__(self, config: ReferenceConfig) -> None:
        self._limit = config.max_deviation
        self.scale = 1.0

    def update(self, deviation: float) -> None:
        """Takes note of an iteration's mean <(v - v_ref)^2>."""
        if self._limit is None or not math.isfinite(deviation):
            return
        error = min(max(deviation / self._limit - 1.0, -_ERROR), _ERROR)
        self.scale = max(1.0, self.scale * (1.0 + _GAIN * error))
