"""The name somebody probably meant."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A question: did you mean the nearest in `known`, else what begins or ends alike; "" where nothing does."""
    known = list(known)
    last = name.rpartition(".")[2].lstrip("-")
    alike = [each for each in known if last and each.rpartition(".")[2].lstrip("-") == last]
    near = alike if "." not in name else []
    near = near or get_close_matches(name, known, n=1, cutoff=0.75)
    near = near or [each for each in known if name and each.startswith(name)]
    near = near or alike or get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {' or '.join(map(repr, near[:3]))}?" if near else ""
