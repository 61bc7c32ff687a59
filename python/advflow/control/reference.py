"""An adaptive pull towards the reference, which keeps a long run from drifting away."""

from __future__ import annotations

from collections.abc import Mapping

_GAIN = 0.1  # with _ERROR the constants of the adaptive KL penalty: at most 2 % an iteration
_ERROR = 0.2


class ReferenceControl:
    """Scales the weight of the reference so that the learner's distance from it settles around a target.

    The adaptive KL penalty of Ziegler et al. (arXiv 1909.08593, section 2.2) with a floor: `scale` never falls below 1,
    which is the weight that was asked for. A target of None leaves it at 1. `scale` is all the state there is.
    """

    def __init__(self, target: float | None) -> None:
        self._target = target
        self.scale = 1.0

    def state_dict(self) -> dict[str, float]:
        return {"scale": self.scale}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Without a target there is no scale to go on from."""
        if self._target is not None:
            self.scale = float(state["scale"])

    def update(self, row: dict[str, float]) -> dict[str, float]:
        """Takes note of an iteration's metrics; returns what belongs into its log, the scale it was made with."""
        if self._target is None:
            return {}
        used, deviation = self.scale, row["reference_deviation"]
        # 0 is what a loss reports that had no usable sample: nothing was measured, so nothing is concluded.
        if deviation > 0:
            error = min(max(deviation / self._target - 1.0, -_ERROR), _ERROR)
            self.scale = max(1.0, used * (1.0 + _GAIN * error))
        return {"reference_scale": used}
