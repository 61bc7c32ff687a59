"""Several runs on one page: how each went over the same images, and in which settings they differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

from advflow.report.charts import Chart, Series, Values, draw, draw_both, smooth, swatch
from advflow.report.data import Run, number
from advflow.report.panels import Panel, bin_size, binned, column, grouped_panels
from advflow.report.text import DASH, direction, duration_text, gain_text, plain, score_text, value_text
from advflow.settings.numbers import flatten

_LEFT_OUT = ("Time",)  # of groups of metrics: another machine's seconds compare nothing


def titles_of(folders: Sequence[Path]) -> list[str]:
    """As much of the end of each path as tells them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for count in range(1, max(map(len, parts)) + 1):
        titles = ["/".join(each[-count:]) for each in parts]
        if len(set(titles)) == len(titles):
            return titles
    raise ValueError("the runs to compare name one folder twice; accepted are folders of different runs")


def comparison_sections(runs: Sequence[Run]) -> tuple[list[str], list[Chart]]:
    """The page's body, and its charts."""
    scores, score_charts = _scores(runs)
    metrics, metric_charts = _metrics(runs)
    sections = [_head(runs), scores, _samples(runs), metrics, _settings(runs)]
    return [section for section in sections if section], [*score_charts, *metric_charts]


def _head(runs: Sequence[Run]) -> str:
    """A row a run, the best at its end first."""
    places = sorted(range(len(runs)), key=lambda place: -_end(runs[place]))
    rows = []
    for place in places:
        run = runs[place]
        base, final = run.ends()
        best = run.best
        images = run.images
        cells = [
            plain(run.config.get("algorithm")),
            f"{run.done:,} of {run.iterations:,}" if not run.finished else f"{run.done:,}",
            DASH if images is None else f"{images:,}",
            duration_text(run.seconds),
            score_text(base),
            score_text(final),
        ]
        rows.append(
            f'<tr><th scope="row"><span class="entry">{swatch(place)} {escape(run.name)}</span></th>'
            f"<td>{escape(cells[0])}</td>"
            + "".join(f'<td class="number">{escape(cell)}</td>' for cell in cells[1:])
            + f'<td class="number {direction(base, final)}">{gain_text(base, final)}</td>'
            f'<td class="number">{DASH if best is None else f"{score_text(best[0])} at {best[1]:,}"}</td></tr>'
        )
    head = "".join(
        f'<th class="{css_class}" scope="col">{name}</th>'
        for name, css_class in (
            ("run", ""),
            ("algorithm", ""),
            *((name, "number") for name in ("iterations", "images", "time", "before", "at last", "gain", "best")),
        )
    )
    return (
        f'<header>\n<div class="top"><h1>{len(runs)} runs</h1></div>\n'
        '<div class="card scroll"><table><thead><tr>'
        f"{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>\n</header>"
    )


def _end(run: Run) -> float:
    final = run.ends()[1]
    return float("-inf") if final is None else final


def _scores(runs: Sequence[Run]) -> tuple[str, list[Chart]]:
    """Held-out scores over the images that each run has drawn; of each reward where all have several."""
    if not any(run.evals for run in runs):
        return "", []
    whole = _by_images(runs, "held_out", "held-out score", lambda run: run.scores())
    whole_figure = f'<figure class="card">{_legend(whole)}{draw_both(whole, 420, 340)}</figure>'
    named = [run.rewards for run in runs]
    shared = [name for name in named[0] if all(name in names for names in named)]
    charts = [_by_images(runs, f"held_out/{name}", "", lambda run, n=name: run.reward_scores(n)) for name in shared]  # type: ignore[misc]
    figures = "".join(_small(name, "", chart) for name, chart in zip(shared, charts, strict=True))
    each = f'<h3>Each reward</h3><div class="panels">{figures}</div>' if figures else ""
    return (
        "<section>\n<h2>Held-out score</h2>\n"
        '<p class="lead">Over images drawn, those of candidate prompts among them. What a run scores is its own '
        "reward: runs of different rewards cannot be compared by it.</p>\n"
        f"{whole_figure}{each}\n</section>"
    ), [whole, *charts]


def _by_images(runs: Sequence[Run], key: str, y_label: str, scores: Callable[[Run], Values]) -> Chart:
    drawn = [[_images(run, place) for place in range(len(run.evals))] for run in runs]
    x = sorted({images for each in drawn for images in each})
    lines = [dict(zip(images, scores(run), strict=True)) for images, run in zip(drawn, runs, strict=True)]
    series = [
        Series(run.name, [line.get(images) for images in x], place)
        for place, (run, line) in enumerate(zip(runs, lines, strict=True))
    ]
    ends = ", ".join(f"{each.name} at last {score_text(_last(each.values))}" for each in series)
    return Chart(
        key=key,
        label=f"{y_label or key} by images drawn: {ends}",
        x=x,
        series=series,
        x_label="images" if y_label else "",
        x_name="images",
        y_label=y_label,
        markers=True,
        end_labels=True,
        bridged=True,
    )


def _images(run: Run, place: int) -> int:
    row = run.evals[place]
    images = number(row.get("images"))
    return int(row["iteration"] if images is None else images)


def _legend(chart: Chart) -> str:
    buttons = "".join(
        f'<button type="button" aria-pressed="true" data-series="{index}">{swatch(series.style)}'
        f'<span>{escape(series.name)}</span><span class="value">{score_text(_last(series.values))}</span></button>'
        for index, series in enumerate(chart.series)
    )
    return f'<div class="legend">{buttons}</div>'


def _last(values: Values) -> float | None:
    return next((value for value in reversed(values) if value is not None), None)


def _small(title: str, note: str, chart: Chart) -> str:
    small = f"<small>{escape(note)}</small>" if note else ""
    return (
        f'<figure class="card panel several"><figcaption><b>{escape(title)}</b>{small}</figcaption>'
        f"{draw(chart, 260, 150)}</figure>"
    )


def _samples(runs: Sequence[Run]) -> str:
    """The last grid of each."""
    shown = [(run, run.grids[-1]) for run in runs if run.grids]
    if not shown:
        return ""
    pictures = "".join(
        f'<figure class="card"><figcaption><b>{escape(run.name)}</b> <span class="quiet">iteration '
        f'{grid.iteration:,}</span></figcaption><img src="{grid.uri}" width="{grid.width}" height="{grid.height}" '
        f'alt="{escape(f"Sample grid of {run.name} at iteration {grid.iteration:,}")}"></figure>'
        for run, grid in shown
    )
    return (
        '<section>\n<h2>Samples</h2>\n<p class="lead">The last ones of each run.</p>\n'
        f'<div class="gallery">{pictures}</div>\n</section>'
    )


def _metrics(runs: Sequence[Run]) -> tuple[str, list[Chart]]:
    """Every metric that two runs or more have logged, smoothed."""
    logged = [run for run in runs if run.metrics]
    if len(logged) < 2:
        return "", []
    panels = [Panel("reward", "Training reward", "mean of each rollout")]
    together = [row for run in logged for row in run.metrics]
    panels += [panel for group, each in grouped_panels(together).items() if group not in _LEFT_OUT for panel in each]
    size = bin_size(max(run.done for run in logged))
    charts, figures = [], []
    for panel in panels:
        if sum(any(number(row.get(panel.key)) is not None for row in run.metrics) for run in logged) < 2:
            continue
        if panel.fault and all(number(row.get(panel.key)) in (0.0, None) for row in together):
            continue
        charts.append(_metric_chart(runs, panel, size))
        figures.append(_small(panel.title, panel.note, charts[-1]))
    bins = f" Each point stands for {size} iterations." if size > 1 else ""
    return (
        "<section>\n<h2>Metrics</h2>\n"
        '<p class="lead">By iteration, as moving averages of weight 0.9 but for extremes and faults: those that two '
        f"runs or more have logged, and not zero everywhere.{bins}</p>\n"
        f'<div class="panels">{"".join(figures)}</div>\n</section>'
    ), charts


def _metric_chart(runs: Sequence[Run], panel: Panel, size: int) -> Chart:
    x = list(range(max(run.done for run in runs)))
    pick = max if panel.fault else panel.worst
    series = []
    for place, run in enumerate(runs):
        found = dict(zip((row["iteration"] for row in run.metrics), column(run.metrics, panel.key), strict=True))
        values = [found.get(iteration) for iteration in x]
        if panel.smoothed and pick is None:
            values = smooth(values)
        series.append(Series(run.name, binned(values, size, pick), place))
    ends = ", ".join(f"{each.name} {value_text(_last(each.values), panel.unit)}" for each in series)
    label = f"{panel.title} by iteration, at last {ends}"
    return Chart(f"metric/{panel.key}", label, x[::size], series, x_label="", unit=panel.unit, bridged=True)


def _settings(runs: Sequence[Run]) -> str:
    """Settings and versions that are not the same in all."""
    configs = [run.config | {f"version of {name}": each for name, each in _versions(run).items()} for run in runs]
    names = list(dict.fromkeys(name for config in configs for name in config))
    differing = [name for name in names if name != "out" and len({repr(config.get(name)) for config in configs}) > 1]
    if not differing:
        return '<section>\n<h2>Settings</h2>\n<p class="lead">All have the same.</p>\n</section>'
    rows = "".join(
        f'<tr><th scope="row" class="mono">{escape(name)}</th>'
        + "".join(f'<td class="mono">{escape(plain(config.get(name)))}</td>' for config in configs)
        + "</tr>"
        for name in differing
    )
    head = "".join(f'<th scope="col">{escape(run.name)}</th>' for run in runs)
    return (
        f'<section>\n<h2>Settings</h2>\n<p class="lead">Those in which they differ, of {len(names):,}.</p>\n'
        f'<div class="card scroll"><table><thead><tr><th scope="col">setting</th>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>\n</section>"
    )


def _versions(run: Run) -> dict[str, object]:
    versions = run.summary.get("versions")
    return flatten(versions) if isinstance(versions, dict) else {}
