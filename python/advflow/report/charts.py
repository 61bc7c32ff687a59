"""Line charts as inline SVG, complete without a script; the page's script adds hovering and hiding on top."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Literal

Values = list[float | None]
"""One value per x; None where there is none, which leaves a gap in the line."""

_DASHES = ("", "7 3", "2 3", "9 3 2 3")
_COLOURS = 6
_MARKERS = ("circle", "square", "triangle", "diamond", "wedge", "cross")
_MOST_MARKERS = 30
_LABEL_HEIGHT = 15
_ROUNDING = 1e-5  # relative spread below which values are drawn as equal: fp32 noise is no curve
_CHARACTER = 6.6  # pixels, about, of the 12 px labels


@dataclass(frozen=True)
class Series:
    """One line. `style` numbers the colour, dash and marker; "main" stands out, "raw" stays in the background."""

    name: str
    values: Values
    style: int | Literal["main", "raw"] = "main"


@dataclass(frozen=True)
class Chart:
    """Lines over common `x`, of which `notes` says more when hovered. `unit` follows every value.

    `x_name` is what one x is, `bridged` lets a line go on where it has no value.
    """

    key: str
    label: str
    x: list[int]
    series: list[Series]
    x_label: str = "iteration"
    y_label: str = ""
    unit: str = ""
    notes: list[str] = field(default_factory=list)
    markers: bool = False
    end_labels: bool = False
    x_name: str = "iteration"
    bridged: bool = False


@dataclass(frozen=True)
class _Frame:
    """Where data coordinates lie in the picture, in its pixels."""

    left: float
    top: float
    right: float
    bottom: float
    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, value: float) -> float:
        return self.left + (value - self.x_low) / (self.x_high - self.x_low) * (self.right - self.left)

    def y(self, value: float) -> float:
        return self.bottom - (value - self.y_low) / (self.y_high - self.y_low) * (self.bottom - self.top)


def draw(chart: Chart, width: int, height: int, css_class: str = "") -> str:
    """The chart as an <svg> element of `width` x `height` user units."""
    values = [value for series in chart.series for value in series.values if value is not None]
    y_ticks, y_low, y_high = value_axis(values, max(3, height // 65))
    x_ticks, x_low, x_high = _iteration_axis(chart.x, max(3, width // 110))
    y_texts = [tick_text(tick, y_ticks) for tick in y_ticks]
    labels = chart.end_labels and width >= 600
    longest_name = max((len(series.name) for series in chart.series), default=0)
    frame = _Frame(
        left=max(28, 12 + _CHARACTER * max(map(len, y_texts), default=0)) + (18 if chart.y_label else 0),
        top=10,
        right=width - (18 + _CHARACTER * longest_name if labels else 14),
        bottom=height - (40 if chart.x_label else 24),
        x_low=x_low,
        x_high=x_high,
        y_low=y_low,
        y_high=y_high,
    )
    numbers = (frame.left, frame.top, frame.right, frame.bottom, x_low, x_high, y_low, y_high)
    parts = [
        f'<svg class="chart {css_class}" viewBox="0 0 {width} {height}" role="img" tabindex="0"'
        f' aria-label="{escape(chart.label)}" data-chart="{escape(chart.key)}"'
        f' data-frame="{" ".join(format(n, ".6g") for n in numbers)}">',
        *_axes(frame, chart, x_ticks, list(zip(y_ticks, y_texts, strict=True)), height),
    ]
    heights = _spread_labels(chart, frame) if labels else {}
    for index, series in enumerate(chart.series):
        parts.append(_line(frame, chart, index, series, heights.get(index)))
    if not values:
        x, y = (frame.left + frame.right) / 2, (frame.top + frame.bottom) / 2
        parts.append(f'<text class="empty" x="{x:.1f}" y="{y:.1f}" text-anchor="middle">no values yet</text>')
    parts.append("</svg>")
    return "".join(parts)


def draw_both(chart: Chart, height: int, narrow_height: int) -> str:
    """The chart twice, for wide and for narrow windows: scaled down, the text of one would be too small to read."""
    return draw(chart, 1016, height, "wide") + draw(chart, 380, narrow_height, "narrow")


def swatch(style: int | str) -> str:
    """A short piece of a series' line, for legends."""
    marker = _marker(style, 14, 6) if isinstance(style, int) else ""
    return (
        f'<svg class="swatch {_css_class(style)}" viewBox="0 0 28 12" width="28" height="12" aria-hidden="true">'
        f'<path class="line" d="M1 6H27"{_dash(style)}/>{marker}</svg>'
    )


def smooth(values: Values, weight: float = 0.9) -> Values:
    """Exponential moving average that gives the first values their full weight; gaps stay gaps."""
    result: Values = []
    mean = total = 0.0
    for value in values:
        if value is None:
            result.append(None)
            continue
        mean = weight * mean + (1 - weight) * value
        total = weight * total + (1 - weight)
        result.append(mean / total)
    return result


def value_axis(values: Sequence[float], count: int) -> tuple[list[float], float, float]:
    """About `count` round ticks for finite `values`, and the range of the axis. Zero is shown where it is near."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    if 0 < low < 0.6 * high:
        low = 0.0
    if 0.6 * low < high < 0:
        high = 0.0
    if high - low <= _ROUNDING * max(abs(low), abs(high)):
        margin = abs(high) * 0.5 or 1.0
        low, high = (0.0, high + margin) if high >= 0 else (low - margin, 0.0)
    step = _nice_step((high - low) / count)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [index * step for index in range(first, last + 1)]
    return ticks, ticks[0], ticks[-1]


def tick_text(value: float, ticks: Sequence[float]) -> str:
    """`value` with as many digits as tell the ticks apart."""
    step = abs(ticks[1] - ticks[0]) if len(ticks) > 1 else abs(value) or 1.0
    largest = max(map(abs, ticks))
    if value == 0:
        return "0"
    if largest < 1e-3 or largest >= 1e5:
        digits = max(0, math.floor(math.log10(abs(value))) - math.floor(math.log10(step) + 1e-9))
        exponent_form = f"{value:.{digits + (0 if _is_whole(step) else 1)}e}"
        mantissa, _, exponent = exponent_form.partition("e")
        mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
        return f"{mantissa}e{int(exponent)}".replace("-", "\N{MINUS SIGN}", 1 if value < 0 else 0)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9)) + (0 if _is_whole(step) else 1)
    return f"{value:,.{decimals}f}".replace("-", "\N{MINUS SIGN}")


def _is_whole(step: float) -> bool:
    """Whether one significant digit is enough for the step: true for 1, 2 and 5 times a power of ten, not for 2.5."""
    mantissa = step / 10.0 ** math.floor(math.log10(step) + 1e-9)
    return abs(mantissa - round(mantissa)) < 1e-6


def _nice_step(least: float) -> float:
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= least * (1 - 1e-9))


def _iteration_axis(x: Sequence[int], count: int) -> tuple[list[int], float, float]:
    low, high = min(x, default=0), max(x, default=1)
    high = max(high, low + 1)
    step = max(1, round(_nice_step((high - low) / count)))
    return list(range(-(-low // step) * step, high + 1, step)), low, high


def _axes(
    frame: _Frame, chart: Chart, x_ticks: Sequence[int], y_ticks: Sequence[tuple[float, str]], height: int
) -> list[str]:
    parts = []
    for value, text in y_ticks:
        y = frame.y(value)
        parts.append(f'<path class="grid" d="M{frame.left:.1f} {y:.1f}H{frame.right:.1f}"/>')
        parts.append(f'<text class="tick" x="{frame.left - 6:.1f}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    for tick in x_ticks:
        x = frame.x(tick)
        parts.append(f'<path class="axis" d="M{x:.1f} {frame.bottom:.1f}v4"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{frame.bottom + 17:.1f}" text-anchor="middle">{tick:,}</text>')
    parts.append(f'<path class="axis" d="M{frame.left:.1f} {frame.bottom:.1f}H{frame.right:.1f}"/>')
    if chart.x_label:
        x = (frame.left + frame.right) / 2
        text = escape(chart.x_label)
        parts.append(f'<text class="title" x="{x:.1f}" y="{height - 5}" text-anchor="middle">{text}</text>')
    if chart.y_label:
        y = (frame.top + frame.bottom) / 2
        parts.append(
            f'<text class="title" transform="translate(13 {y:.1f}) rotate(-90)" text-anchor="middle">'
            f"{escape(chart.y_label)}</text>"
        )
    return parts


def _line(frame: _Frame, chart: Chart, index: int, series: Series, label_height: float | None) -> str:
    points = [
        None if value is None else (frame.x(x), frame.y(value)) for x, value in zip(chart.x, series.values, strict=True)
    ]
    if chart.bridged:
        points = [point for point in points if point is not None]
    path, pen_is_down = "", False
    for place, point in enumerate(points):
        if point is not None:
            path += f"{'L' if pen_is_down else 'M'}{point[0]:.1f} {point[1]:.1f}"
            alone = not pen_is_down and (place + 1 == len(points) or points[place + 1] is None)
            path += "h0" if alone else ""  # round line caps make this a dot
        pen_is_down = point is not None
    parts = [f'<g class="series {_css_class(series.style)}" data-series="{index}">']
    parts.append(f'<path class="line" d="{path}"{_dash(series.style)}/>')
    if chart.markers:
        every = -(-len(points) // _MOST_MARKERS)
        parts += [_marker(series.style, *point) for point in points[::every] if point is not None]
    end = next((point for point in reversed(points) if point is not None), None)
    if label_height is not None and end is not None:
        leader = f"M{end[0] + 5:.1f} {end[1]:.1f}L{frame.right + 11:.1f} {label_height:.1f}"
        parts.append(f'<path class="leader" d="{leader}"/>')
        parts.append(
            f'<text class="name" x="{frame.right + 14:.1f}" y="{label_height + 4:.1f}">{escape(series.name)}</text>'
        )
    parts.append("</g>")
    return "".join(parts)


def _spread_labels(chart: Chart, frame: _Frame) -> dict[int, float]:
    """Heights of the names at the lines' ends, moved apart where they would overlap; none where there is no room."""
    ends = {
        index: frame.y(last)
        for index, series in enumerate(chart.series)
        if (last := next((v for v in reversed(series.values) if v is not None), None)) is not None
    }
    if len(ends) * _LABEL_HEIGHT > frame.bottom - frame.top:
        return {}
    heights: dict[int, float] = {}
    lowest = frame.top - _LABEL_HEIGHT
    for index in sorted(ends, key=ends.__getitem__):
        lowest = max(ends[index], lowest + _LABEL_HEIGHT)
        heights[index] = lowest
    ceiling = frame.bottom
    for index in sorted(heights, key=heights.__getitem__, reverse=True):
        heights[index] = min(heights[index], ceiling)
        ceiling = heights[index] - _LABEL_HEIGHT
    return heights


def _css_class(style: int | str) -> str:
    return f"s{style % _COLOURS}" if isinstance(style, int) else style


def _dash(style: int | str) -> str:
    # The dash also turns over with each round of the colours, so that two lines never share both.
    dash = _DASHES[(style + style // _COLOURS) % len(_DASHES)] if isinstance(style, int) else ""
    return f' stroke-dasharray="{dash}"' if dash else ""


def _marker(style: int | str, x: float, y: float) -> str:
    shape = _MARKERS[style % len(_MARKERS)] if isinstance(style, int) else "circle"
    paths = {
        "square": "m-3.2 -3.2h6.4v6.4h-6.4z",
        "triangle": "m0 -4.2l4 7h-8z",
        "diamond": "m0 -4.6l4.2 4.6l-4.2 4.6l-4.2 -4.6z",
        "wedge": "m0 4.2l4 -7h-8z",
        "cross": "m-3.2 -3.2l6.4 6.4m0 -6.4l-6.4 6.4",
    }
    if shape == "circle":
        return f'<circle class="marker" cx="{x:.1f}" cy="{y:.1f}" r="3.4"/>'
    return f'<path class="marker" d="M{x:.1f} {y:.1f}{paths[shape]}"/>'
