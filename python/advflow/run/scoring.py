"""Scores of images that are drawn batch by batch, elsewhere while the next batch is drawn."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import wait

import torch

from advflow.core.ranks import Ranks
from advflow.data.prompt import Prompt
from advflow.rewards import Begun, Scores
from advflow.rewards.several import Rewards, in_columns
from advflow.run.interrupt import Interrupted

_AHEAD = 2  # batches that wait for their scores while another one is drawn: more would only fill memory
_LOOK_UP = 0.1  # seconds between two looks at whether the run is to stop


class Scoring:
    """Scores this process's images of `prompts` in their order. What is still asked for when it ends, nobody wants.

    `check` raises Interrupted where the run is to stop, which of several `ranks` all do then, together.
    """

    def __init__(self, rewards: Rewards, prompts: list[Prompt], check: Callable[[], None], ranks: Ranks) -> None:
        self._rewards, self._prompts, self._check, self._ranks = rewards, prompts, check, ranks
        self._begun: list[list[Begun]] = []
        self._count = 0
        self._stopped = False

    def __enter__(self) -> Scoring:
        return self

    def __exit__(self, *_: object) -> None:
        for begun in self._begun:
            for part in begun:
                for future in part.futures:
                    future.cancel()

    def add(self, images: torch.Tensor) -> None:
        """The next images; returns when those of two batches before have their scores."""
        first, self._count = self._count, self._count + len(images)
        self._begun.append(self._rewards.begin(images, self._prompts[first : self._count]))
        self._wait_for(self._begun[:-_AHEAD])

    def scores(self) -> Scores:
        """Rewards and scores, fp32 [N, R] on the CPU, of all images that were added."""
        self._wait_for(self._begun)
        if self._ranks.any(self._stopped):
            raise Interrupted
        parts = [in_columns(begun) for begun in self._begun]
        return Scores(torch.cat([part.reward for part in parts]), torch.cat([part.score for part in parts]))

    def _wait_for(self, batches: list[list[Begun]]) -> None:
        left = {future for begun in batches for part in begun for future in part.futures}
        while left and not self._stopped:
            left = wait(left, _LOOK_UP).not_done
            try:
                if left:
                    self._check()
            except Interrupted:
                # Not raised here: other processes may be in the middle of a pass that all of them make.
                self._stopped = True
