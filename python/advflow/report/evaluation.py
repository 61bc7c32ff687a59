"""What the held-out evaluations showed: curves, sample grids and categories."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from html import escape

from advflow.report.charts import Chart, Series, Values, draw, draw_both, swatch, value_axis
from advflow.report.data import Grid, Run, evenly_spaced, number
from advflow.report.text import DASH, direction, duration_text, gain_text, readable, score_text

_GRID_GAP = 4  # pixels around every image of a sample grid
_MOST_TABLE_ROWS = 100


def held_out_section(run: Run) -> tuple[str, list[Chart]]:
    if not run.evals:
        return "", []
    categories = run.categories
    names = ["overall"] + [readable(name) for name in categories]
    series = [Series(name, run.scores(name), style) for style, name in enumerate(categories)]
    series = [replace(entry, name=readable(entry.name)) for entry in series]
    base, final = run.ends()
    chart = Chart(
        key="held_out",
        label=f"Held-out score by iteration, overall {score_text(base)} at first, {score_text(final)} at last; "
        + ", ".join(f"{readable(name)} {' to '.join(map(score_text, run.ends(name)))}" for name in categories),
        x=[row["iteration"] for row in run.evals],
        series=[*series, Series("overall", run.scores())],  # last, so that it is drawn on top
        y_label="held-out score",
        notes=_evaluation_notes(run),
        markers=True,
        end_labels=True,
    )
    order = [len(series), *range(len(series))]
    buttons = "".join(
        f'<button type="button" aria-pressed="true" data-series="{index}">{swatch(chart.series[index].style)}'
        f'<span>{escape(name)}</span><span class="value">{score_text(chart.series[index].values[-1])}</span></button>'
        for index, name in zip(order, names, strict=True)
    )
    count = run.config.get("evaluation.prompts_per_category")
    how = f"Up to {count} held-out prompts of each category" if count else "The held-out prompts"
    return (
        "<section>\n<h2>Held-out score</h2>\n"
        f'<p class="lead">{escape(how)}, one image each, always from the same noise.</p>\n'
        f'<figure class="card"><div class="legend">{buttons}</div>'
        f"{draw_both(chart, 420, 340)}</figure>\n{_evaluation_table(run)}\n</section>"
    ), [chart]


def held_out_rewards_section(run: Run) -> tuple[str, list[Chart]]:
    """A chart for each of several rewards."""
    lead = "Held-out score of each, without its weight. Above is their weighted sum."
    columns = {name: run.reward_scores(name) for name in run.rewards}
    return _panels_section(run, "Each reward", lead, "held_out", columns, {name: name for name in columns})


_OF_SETS = {
    "fid": "FID",
    "precision": "Precision",
    "recall": "Recall",
    "modes": "Modes that occur",
    "modes_kl": "Unevenness of modes",
    "vendi": "Vendi score",
}


def distribution_section(run: Run) -> tuple[str, list[Chart]]:
    """A chart for each number of the held-out images as a set."""
    lead = (
        "The held-out images together, beside real ones of the same prompts. FID and unevenness, of colours and shapes "
        "where the prompt leaves the colour open, are better low, the others high."
    )
    columns = {name: run.of_sets(name) for name in run.numbers_of_sets}
    titles = {name: _OF_SETS.get(name, readable(name)) for name in columns}
    return _panels_section(run, "Quality and variety", lead, "distribution", columns, titles)


def _panels_section(
    run: Run, heading: str, lead: str, key: str, columns: Mapping[str, Values], titles: Mapping[str, str]
) -> tuple[str, list[Chart]]:
    """A small chart for each of `columns`, numbers of every evaluation."""
    charts = [
        Chart(
            key=f"{key}/{name}",
            label=f"{titles[name]} of held-out images by iteration, at last {score_text(values[-1])}",
            x=[row["iteration"] for row in run.evals],
            series=[Series(titles[name], values)],
            x_label="",
            notes=_evaluation_notes(run),
            markers=True,
        )
        for name, values in columns.items()
    ]
    if not charts:
        return "", []
    figures = "".join(
        f'<figure class="card panel"><figcaption><b>{escape(titles[name])}</b>'
        f'<span class="value">{score_text(chart.series[0].values[-1])}</span></figcaption>'
        f"{draw(chart, 260, 150)}</figure>"
        for name, chart in zip(columns, charts, strict=True)
    )
    return (
        f'<section>\n<h2>{heading}</h2>\n<p class="lead">{lead}</p>\n<div class="panels">{figures}</div>\n</section>'
    ), charts


def _evaluation_notes(run: Run) -> list[str]:
    notes = []
    for row in run.evals:
        images, seconds = number(row.get("images")), number(row.get("seconds"))
        parts = [f"{images:,.0f} images" if images is not None else "", duration_text(seconds) if seconds else ""]
        notes.append(", ".join(part for part in parts if part))
    return notes


def _evaluation_table(run: Run) -> str:
    categories = run.categories
    head = "".join(
        f'<th class="number" scope="col">{escape(name)}</th>'
        for name in ["images", "time", "overall", *map(readable, categories)]
    )
    rows = []
    for row in evenly_spaced(run.evals, _MOST_TABLE_ROWS):
        images = number(row.get("images"))
        cells = [DASH if images is None else f"{images:,.0f}", duration_text(number(row.get("seconds")))]
        cells += [score_text(number(row.get("overall")))]
        cells += [score_text(number(row["categories"].get(name))) for name in categories]
        rows.append(
            f'<tr><th class="number" scope="row">{row["iteration"]:,}</th>'
            + "".join(f'<td class="number">{cell}</td>' for cell in cells)
            + "</tr>"
        )
    return (
        f'<details><summary>All evaluations as a table</summary>\n<div class="scroll"><table>'
        f'<thead><tr><th class="number" scope="col">iteration</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div></details>"
    )


def samples_section(run: Run) -> str:
    if not run.grids:
        return ""
    first, later = run.grids[0], run.grids[1:]
    categories = run.categories
    labelled = _rows_are_categories(first, len(categories))
    names = [readable(name) for name in categories] if labelled else []
    rows = f'<div class="rows">{"".join(f"<span>{escape(name)}</span>" for name in names)}</div>' if names else ""
    corner = '<span class="corner"></span>' if names else ""
    shown = len(later) - 1
    pictures = "".join(_picture(grid, names, hidden=index != shown) for index, grid in enumerate(later))
    if not later:
        pictures = '<p class="quiet">The next evaluation adds a grid here.</p>'
    under = f'<p class="row-names">Rows from the top: {escape(", ".join(names))}.</p>' if names else ""
    slider = ""
    if len(later) > 1:
        slider = (
            f'<label class="slider" hidden>Iteration <input type="range" min="0" max="{shown}" value="{shown}" step="1"'
            f' aria-valuetext="{_grid_name(later[-1])}"><output>{_grid_name(later[-1])}</output></label>'
        )
    return (
        "<section>\n<h2>Samples</h2>\n"
        '<p class="lead">The same held-out prompts from the same noise, before training and later.</p>\n'
        f'<div class="card"><div class="compare{"" if names else " unlabelled"}">'
        f'{corner}<span class="heading">{_grid_name(first)}</span>'
        f'<span class="heading later">{_grid_name(later[-1]) if later else "later"}</span>'
        f'{rows}<div>{_picture(first, names, hidden=False)}</div><div class="later">{pictures}</div></div>'
        f"{under}{slider}{_prompts_table(run.sample_prompts, run.categories)}</div>\n</section>"
    )


def _prompts_table(prompts: list[str], categories: list[str]) -> str:
    """The prompts where their images are; in numbered rows where those are not the categories."""
    if not prompts:
        return ""
    columns = max(1, len(prompts) // max(1, len(categories)))
    rows = [prompts[start : start + columns] for start in range(0, len(prompts), columns)]
    titles = [f"row {number}" for number in range(1, len(rows) + 1)]
    if len(categories) == len(rows):
        titles = [readable(name) for name in categories]
    body = "".join(
        f'<tr><th scope="row">{escape(title)}</th>{"".join(f"<td>{escape(prompt)}</td>" for prompt in row)}</tr>'
        for title, row in zip(titles, rows, strict=True)
    )
    caption = "Their prompts, in the places of the images"
    return f'<table class="prompts"><caption>{caption}</caption><tbody>{body}</tbody></table>'


def _grid_name(grid: Grid) -> str:
    return "before training" if grid.iteration == 0 else f"iteration {grid.iteration:,}"


def _picture(grid: Grid, names: list[str], hidden: bool) -> str:
    rows = f"; rows: {', '.join(names)}" if names else ""
    return (
        f'<img src="{grid.uri}" width="{grid.width}" height="{grid.height}" data-label="{_grid_name(grid)}"'
        f' alt="{escape(f"Sample grid, {_grid_name(grid)}{rows}")}"{" hidden" if hidden else ""}>'
    )


def _rows_are_categories(grid: Grid, categories: int) -> bool:
    """Whether square images fill the picture in `categories` rows; not so where categories differ in size."""
    if categories == 0 or (grid.height - _GRID_GAP) % categories:
        return False
    return (grid.width - _GRID_GAP) % ((grid.height - _GRID_GAP) // categories) == 0


def categories_section(run: Run) -> str:
    if len(run.evals) < 2 or not run.categories:
        return ""
    ends = [(readable(name), "one", *run.ends(name)) for name in run.categories] + [("overall", "all", *run.ends())]
    known = [value for _, _, *pair in ends for value in pair if value is not None]
    low, high = 0.0, 1.0
    if not all(low <= value <= high for value in known):
        _, low, high = value_axis([0.0, *known], 4)
    rows = "".join(
        f'<tr class="{css_class}"><th scope="row">{escape(name)}</th>'
        f'<td class="number">{score_text(base)}</td><td class="number">{score_text(final)}</td>'
        f'<td class="number {direction(base, final)}">{gain_text(base, final)}</td>'
        f'<td class="bars">{_bars(base, final, low, high)}</td></tr>'
        for name, css_class, base, final in ends
    )
    last = run.evals[-1]["iteration"]
    return (
        "<section>\n<h2>Categories</h2>\n"
        f'<p class="lead">Bars from {low:g} to {high:g}: <span class="entry">{_key("base")}before training</span> '
        f'<span class="entry">{_key("final")}iteration {last:,}</span></p>\n'
        '<div class="card scroll"><table><thead><tr><th scope="col">category</th>'
        '<th class="number" scope="col">before</th><th class="number" scope="col">after</th>'
        '<th class="number" scope="col">gain</th>'
        f'<th class="bars" scope="col"></th></tr></thead><tbody>{rows}</tbody></table></div>\n</section>'
    )


def _key(css_class: str) -> str:
    rectangle = f'<rect class="{css_class}" width="12" height="10" rx="2"/>'
    return f'<svg class="key" viewBox="0 0 12 10" aria-hidden="true">{rectangle}</svg>'


def _bars(base: float | None, final: float | None, low: float, high: float) -> str:
    def share(value: float | None) -> float:
        return 0.0 if value is None else 100 * (value - low) / (high - low)

    return (
        '<svg aria-hidden="true"><rect class="track" width="100%" height="22" rx="3"/>'
        f'<rect class="base" width="{share(base):.1f}%" y="3" height="5" rx="1"/>'
        f'<rect class="final" width="{share(final):.1f}%" y="10" height="9" rx="1"/></svg>'
    )
