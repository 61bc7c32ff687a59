"""How far a run is and how long it will take: a bar on a terminal, in a log a line for each step."""

from __future__ import annotations

import shutil
import sys
import time
from typing import TextIO

CELLS = 24


def clock(seconds: float) -> str:
    """``"0:05"``, ``"12:30"``, ``"1:02:03"``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Progress:
    """``total`` is work in any unit; what is left is expected to go as fast as what was done."""

    def __init__(self, total: float, stream: TextIO | None = None) -> None:
        self.total, self.done = total, 0.0
        self.stream = stream or sys.stderr
        self.bar = self.stream.isatty()
        self.began = time.monotonic()
        self.said = ""

    def doing(self, text: str, part: str = "") -> None:
        """What goes on from here on; a log is not told of the parts."""
        if self.bar:
            line = f"{self.line()}  {text} {part}"[: shutil.get_terminal_size().columns - 1]
            print(f"\r\033[K{line}", end="", file=self.stream, flush=True)
        elif text != self.said:
            print(f"{self.line()}  {text}", file=self.stream, flush=True)
        self.said = text

    def finished(self, work: float) -> None:
        self.done += work

    def clear(self) -> None:
        """Before anything else is printed."""
        if self.bar:
            print("\r\033[K", end="", file=self.stream, flush=True)

    def line(self) -> str:
        share = min(self.done / self.total, 1.0) if self.total else 1.0
        elapsed = time.monotonic() - self.began
        left = f", {clock(elapsed / share * (1 - share))} left" if share else ""
        filled = round(CELLS * share)
        return f"[{'#' * filled}{'.' * (CELLS - filled)}] {100 * share:3.0f} %  {clock(elapsed)}{left}"
