"""A bar on a terminal; whole lines, now and then, in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10.0


def show_progress(items: range, *, desc: str, unit: str = "it", initial: int = 0, silent: bool = False) -> Any:
    """Iterates over ``items``, ``initial`` of which were done before; has tqdm's `set_postfix` and `close`."""
    if silent:
        return tqdm(items, disable=True)
    if sys.stderr.isatty():
        return tqdm(items, desc=desc, unit=unit, initial=initial, total=initial + len(items))
    return Lines(items, desc, unit, initial)


class Lines:
    """What of tqdm is used here, without carriage returns: a line every ten seconds, and one at the end."""

    def __init__(self, items: range, desc: str, unit: str, initial: int) -> None:
        self.items, self.desc, self.unit, self.initial = items, desc, unit, initial
        self.done = initial
        self.postfix = ""
        self.started = self.last_line = time.monotonic()
        self.said: int | None = None

    def __iter__(self) -> Iterator[int]:
        self.started = self.last_line = time.monotonic()
        for item in self.items:
            yield item
            self.done += 1
            if time.monotonic() - self.last_line >= SECONDS_BETWEEN_LINES:
                self._line()
        self.close()

    def set_postfix(self, **values: object) -> None:
        self.postfix = ", ".join(f"{name}={value}" for name, value in values.items())

    def close(self) -> None:
        """Says how far it came, unless the last line did."""
        if self.said != self.done:
            self._line()

    def _line(self) -> None:
        self.last_line = time.monotonic()
        self.said = self.done
        total = self.initial + len(self.items)
        seconds = self.last_line - self.started
        bar = tqdm.format_meter(
            self.done, total, seconds, prefix=self.desc, unit=self.unit, initial=self.initial, postfix=self.postfix,
            bar_format="{desc}: {percentage:3.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]",
        )  # fmt: skip
        print(bar, file=sys.stderr, flush=True)
