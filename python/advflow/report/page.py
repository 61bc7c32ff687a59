"""Puts the sections, the styles, the script and its data together to one HTML page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from importlib import resources
from string import Template
from typing import Any

from advflow.report.charts import Chart, swatch
from advflow.report.comparison import comparison_sections
from advflow.report.data import Run
from advflow.report.evaluation import (
    categories_section,
    distribution_section,
    held_out_rewards_section,
    held_out_section,
    samples_section,
)
from advflow.report.overview import head_section, headline, settings_section, versions_section
from advflow.report.training import metrics_section, reward_section

# The policy makes the promise "no request leaves this page" one that the browser keeps.
_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; \
script-src 'unsafe-inline'">
<title>$title</title>
<link rel="icon" href="data:,">
<style>
$style</style>
</head>
<body>
<main>
$body
</main>
<script type="application/json" id="data">$data</script>
<script>
$script</script>
</body>
</html>
""")


def render_comparison(runs: Sequence[Run]) -> str:
    """The whole page of several runs."""
    sections, charts = comparison_sections(runs)
    return _page(", ".join(run.name for run in runs), sections, charts)


def render(run: Run) -> str:
    """The whole page."""
    curves, evaluation_chart = held_out_section(run)
    each_reward, each_reward_charts = held_out_rewards_section(run)
    of_sets, of_sets_charts = distribution_section(run)
    reward, reward_chart = reward_section(run)
    metrics, metric_charts = metrics_section(run)
    charts = [*evaluation_chart, *each_reward_charts, *of_sets_charts, *reward_chart, *metric_charts]
    sections = [
        head_section(run),
        curves,
        each_reward,
        of_sets,
        samples_section(run),
        categories_section(run),
        reward,
        metrics,
        settings_section(run),
        versions_section(run),
    ]
    return _page(f"{run.name}: {headline(run)}", sections, charts)


def _page(title: str, sections: Sequence[str], charts: Sequence[Chart]) -> str:
    files = resources.files("advflow.report")
    return _PAGE.substitute(
        title=escape(title),
        style=files.joinpath("style.css").read_text(encoding="utf-8"),
        script=files.joinpath("script.js").read_text(encoding="utf-8"),
        body="\n".join(section for section in sections if section),
        data=_embedded_json({chart.key: _chart_data(chart) for chart in charts}),
    )


def _embedded_json(value: object) -> str:
    """JSON in which no name can end the <script> element that holds it."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _chart_data(chart: Chart) -> dict[str, Any]:
    return {
        "x": chart.x,
        "x_name": chart.x_name,
        "unit": chart.unit,
        "notes": chart.notes,
        "series": [
            {
                "name": series.name,
                "values": [None if value is None else float(f"{value:.5g}") for value in series.values],
                "swatch": swatch(series.style),
            }
            for series in chart.series
        ],
    }
