"""A moving average of the learner's weights, which is evaluated and given away in the learner's place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from advflow.run.state import State, copy_tensors, numbered

AVERAGE = "average"
"""The name of its part of a checkpoint."""


class WeightAverage:
    """After optimiser step n (from 0) average <- d average + (1 - d) learner, d = min(decay, (1 + n) / (10 + n)).

    As in flow_grpo's and DiffusionNFT's code: the beginning of a run does not weigh for long. Nothing that is trained
    depends on it.
    """

    def __init__(self, learner: Sequence[torch.Tensor], decay: float) -> None:
        self._learner, self._decay = learner, decay
        self._weights = [parameter.detach().clone() for parameter in learner]

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self._decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._weights, tuple(self._learner), 1.0 - decay)

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """While it is open, the learner's parameters hold the average. In place, so that whoever holds them sees it."""
        own = [parameter.detach().clone() for parameter in self._learner]
        self._write(self._weights)
        try:
            yield
        finally:
            self._write(own)

    @torch.no_grad()
    def _write(self, weights: list[torch.Tensor]) -> None:
        for parameter, weight in zip(self._learner, weights, strict=True):
            parameter.copy_(weight)

    def state_dict(self) -> State:
        return numbered(self._weights)

    def load_state_dict(self, state: State) -> None:
        copy_tensors(state, self.state_dict())
