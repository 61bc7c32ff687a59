"""SIGINT and SIGTERM as a wish that a run looks up wherever it can stop."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(Exception):
    """Raised between two batches of a rollout or an evaluation, whose beginning a later run repeats."""


class StopRequest:
    """Whether one of `SIGNALS` has arrived. `iteration`, counted from 1, is what the answer to it names."""

    def __init__(self) -> None:
        self.asked = False
        self.iteration = 1

    def check(self) -> None:
        """Raises Interrupted where a stop has been asked for."""
        if self.asked:
            raise Interrupted

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Answers the first signal at once, in words; the second one acts as it would have without this.

        One that was ignored when the run began, as SIGINT is of what a script puts in the background, stays so.
        """

        def ask(signum: int, frame: FrameType | None) -> None:
            self.asked = True
            signal.signal(signum, previous[signal.Signals(signum)])
            answer = f"finishing iteration {self.iteration}: its update, or the batch of images at hand, then saving"
            # Not print(): the signal may have come while the stream was being written to.
            os.write(2, f"\n{signal.Signals(signum).name}: {answer}. A second one stops at once.\n".encode())

        heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        previous = {number: signal.signal(number, ask) for number in heard}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
