"""What every iteration logged: the reward, and all other metrics as small charts."""

from __future__ import annotations

from html import escape

from advflow.report.charts import Chart, Series, Values, draw, draw_both, smooth
from advflow.report.data import Run
from advflow.report.panels import Panel, bin_size, binned, column, grouped_panels
from advflow.report.text import score_text, value_text


def reward_section(run: Run) -> tuple[str, list[Chart]]:
    if not run.metrics:
        return "", []
    rewards = column(run.metrics, "reward")
    size = bin_size(len(rewards))
    chart = Chart(
        key="reward",
        label="Training reward by iteration, "
        + " to ".join(score_text(value) for value in (smooth(rewards)[0], smooth(rewards)[-1])),
        x=[row["iteration"] for row in run.metrics][::size],
        series=[
            Series("this iteration", binned(rewards, size), "raw"),
            Series("moving average", binned(smooth(rewards), size)),
        ],
        y_label="mean reward",
    )
    return (
        "<section>\n<h2>Training reward</h2>\n"
        '<p class="lead">Mean reward of each rollout (faint) and its moving average with weight 0.9.'
        f"{_bin_note(size)}</p>\n"
        f'<figure class="card reward">{draw_both(chart, 300, 260)}</figure>\n</section>'
    ), [chart]


def metrics_section(run: Run) -> tuple[str, list[Chart]]:
    if not run.metrics:
        return "", []
    size = bin_size(len(run.metrics))
    x = [row["iteration"] for row in run.metrics][::size]
    charts: list[Chart] = []
    parts = [f'<section>\n<h2>Metrics</h2>\n<p class="lead">One value an iteration.{_bin_note(size)}</p>']
    for group, panels in grouped_panels(run.metrics).items():
        quiet = [panel for panel in panels if panel.fault and set(column(run.metrics, panel.key)) == {0.0}]
        shown = [panel for panel in panels if panel not in quiet]
        parts.append(f"<h3>{group}</h3>")
        if quiet:
            names = ", ".join(panel.title.lower() for panel in quiet)
            parts.append(f'<p class="quiet">Zero in every iteration: {escape(names)}.</p>')
        figures = []
        for panel in shown:
            values = column(run.metrics, panel.key)
            charts.append(_metric_chart(panel, values, x, size))
            figures.append(_metric_figure(panel, charts[-1]))
        if figures:
            parts.append(f'<div class="panels">{"".join(figures)}</div>')
    return "\n".join([*parts, "</section>"]), charts


def _metric_chart(panel: Panel, values: Values, x: list[int], size: int) -> Chart:
    pick = max if panel.fault else panel.worst
    points = binned(values, size, pick)
    series = [Series(panel.title, points, "main")]
    if panel.smoothed and pick is None:
        # The raw line comes first in the data, because the read-out names the value that was logged.
        series = [Series(panel.title, points, "raw"), Series("moving average", binned(smooth(values), size))]
    label = f"{panel.title} by iteration, at last {value_text(points[-1], panel.unit)}"
    return Chart(panel.key, label, x, series, x_label="", unit=panel.unit)


def _metric_figure(panel: Panel, chart: Chart) -> str:
    last = value_text(chart.series[0].values[-1], panel.unit)
    note = f"<small>{escape(panel.note)}</small>" if panel.note else ""
    return (
        f'<figure class="card panel"><figcaption><b>{escape(panel.title)}</b>{note}'
        f'<span class="value">{last}</span></figcaption>{draw(chart, 260, 150)}</figure>'
    )


def _bin_note(size: int) -> str:
    return f" Each point stands for {size} iterations." if size > 1 else ""
