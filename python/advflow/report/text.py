"""How numbers and names are written on the page. Nothing here is escaped."""

from __future__ import annotations

import math

DASH = "\N{EN DASH}"


def score_text(value: float | None) -> str:
    return DASH if value is None else f"{value:.3f}".replace("-", "\N{MINUS SIGN}")


def gain_text(base: float | None, final: float | None) -> str:
    """The signed difference."""
    return DASH if base is None or final is None else f"{final - base:+.3f}".replace("-", "\N{MINUS SIGN}")


def direction(base: float | None, final: float | None) -> str:
    if base is None or final is None or base == final:
        return "same"
    return "up" if final > base else "down"


def duration_text(seconds: float | None) -> str:
    """Seconds in the two units people would say."""
    if seconds is None:
        return DASH
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{seconds:.3g} s"


def times_text(rollout: float, update: float) -> tuple[str, str, str]:
    """Two times and their sum in seconds, rounded so that what is written adds up."""
    total = rollout + update
    decimals = max(0, 2 - math.floor(math.log10(total))) if 0 < total < 100 else 0
    parts = round(rollout, decimals), round(update, decimals)
    first, second, both = (f"{seconds:,.{decimals}f} s" for seconds in (*parts, sum(parts)))
    return first, second, both


def value_text(value: float | None, unit: str = "") -> str:
    """A metric with four significant digits."""
    if value is None:
        return DASH
    size = abs(value)
    text = f"{value:.2e}" if size != 0 and (size < 1e-3 or size >= 1e6) else f"{value:,.4g}"
    if 1e4 <= size < 1e6:
        text = f"{value:,.0f}"
    sign, text = ("\N{MINUS SIGN}", text[1:]) if text.startswith("-") else ("", text)
    return sign + text.replace("e-0", "e-").replace("e+0", "e") + unit


def readable(name: str) -> str:
    return str(name).replace("_", " ")


def plain(value: object) -> str:
    if value is None:
        return DASH
    if isinstance(value, list):
        return ", ".join(map(plain, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
