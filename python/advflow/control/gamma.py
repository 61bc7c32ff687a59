"""AdvantageFlow's gamma, which tunes itself."""

from __future__ import annotations

import math
from collections.abc import Mapping

from advflow.algorithms.advantage_flow import START_GAMMA
from advflow.settings.methods import LEAST_RHO

_LEAST, _MOST = 0.1, 10.0
_GAIN = 0.1  # so at most 11 % an iteration


class GammaControl:
    """Moves gamma so that a learner goes a target's length in an iteration.

    gamma is an inverse step: what the paper aims at has (1 + A / gamma) times the rollout policy's density. What is
    held is the root of <(v - v_old)^2> over <(v - u)^2>, which has no unit, so that it means the same whatever the
    reward and the latents. It is measured before an iteration's first update, between the learner and a rollout policy
    that keeps rho of itself: as far as velocities are linear in weights, a learner that goes on in one direction is
    rho / (1 - rho) of its iteration's way ahead. A smaller learning rate shortens the way by itself, and so the target
    with it.

    `gamma` is all the state there is.
    """

    def __init__(self, target: float) -> None:
        self._target = target
        self.gamma = START_GAMMA

    def state_dict(self) -> dict[str, float]:
        return {"gamma": self.gamma}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.gamma = float(state["gamma"])

    def update(self, first: Mapping[str, float], rho: float, rate: float) -> dict[str, float]:
        """Takes note of the metrics of an iteration's first update; returns what belongs into its log.

        Of the iteration before, `rho` is the rollout policy's, `rate` the share of the highest learning rate.
        """
        used, deviation, error = self.gamma, first["rollout_deviation"], first["target_error"]
        # 0 is what a loss reports that had no usable sample: nothing was measured, so nothing is concluded.
        measured = 0 < deviation < math.inf and 0 < error < math.inf
        if rho < LEAST_RHO or rate <= 0 or not measured:
            return {"gamma": used}
        # Roots first: the quotient of two finite numbers may be neither finite nor above 0.
        move = math.sqrt(deviation) / math.sqrt(error) * (1 - rho) / rho
        excess = min(max(math.log(move / (self._target * rate)), -1.0), 1.0)
        self.gamma = min(max(used * math.exp(_GAIN * excess), _LEAST), _MOST)
        return {"gamma": used, "learner_move": move}
