"""What a dry run finds, and how it is printed."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

_WIDTH, _LABEL = 120, 22


@dataclass
class Findings:
    """Lines under a label each, in their order, and what is wrong, all of it."""

    lines: list[tuple[str, str]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def say(self, label: str, text: str) -> None:
        self.lines.append((label, text))

    @contextmanager
    def noting(self) -> Iterator[None]:
        """What is refused inside the block is noted, and what comes after the block is looked at all the same."""
        try:
            yield
        except ValueError as error:
            self.fault(" ".join(str(error).split()))

    def fault(self, sentence: str) -> None:
        if sentence not in self.faults:
            self.faults.append(sentence)

    def text(self) -> str:
        """All of it, the verdict last."""
        lines = [
            textwrap.fill(
                f"{label:<{_LABEL}}{text}",
                _WIDTH,
                subsequent_indent=" " * _LABEL,
                break_long_words=False,
                break_on_hyphens=False,
            )
            for label, text in [*self.lines, *(("missing or wrong", fault) for fault in self.faults)]
        ]
        count = len(self.faults)
        verdict = f"not ready: {count} {'things are' if count > 1 else 'thing is'} missing or wrong, above"
        return "\n".join([*lines, verdict if count else "ready"])
