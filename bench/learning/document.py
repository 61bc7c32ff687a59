"""Tables and pictures of docs/learning.md from the logs of its studies."""

from __future__ import annotations

from pathlib import Path
from statistics import mean, stdev
from typing import Any

from bench.learning.pictures import draw_front, draw_set, draw_spread
from bench.learning.studies import STUDIES, Study

Run = dict[str, Any]


def write_document(found: dict[str, dict[str, Any]], docs: Path) -> None:
    """Puts each study's table between its two marks in learning.md, and draws its picture."""
    page = docs / "learning.md"
    text = page.read_text()
    for name, document in found.items():
        if f"<!-- study {name} -->" not in text:
            print(f"{name} is not on the page, which has no mark for it")
            continue
        text = with_table(text, name, table(STUDIES[name], document["runs"]))
        picture = docs / "images" / f"learning-{name}.png"
        _draw(STUDIES[name], by_gain(STUDIES[name], document["runs"]), picture)
    page.write_text(text)


def with_table(text: str, name: str, rows: list[str]) -> str:
    opening, closing = f"<!-- study {name} -->", f"<!-- /study {name} -->"
    if text.count(opening) != 1 or text.count(closing) != 1:
        raise ValueError(f"docs/learning.md has not one {opening} and one {closing}")
    before, rest = text.split(opening)
    return f"{before}{opening}\n" + "\n".join(rows) + f"\n{closing}{rest.split(closing)[1]}"


def table(study: Study, runs: list[Run]) -> list[str]:
    if study.of_set:
        return _sets(study, runs)
    return _several_rewards(study, runs) if study.rewards else _gains(study, runs)


def by_gain(study: Study, runs: list[Run]) -> list[Run]:
    """Of a study of one number the best label first; else in its own order."""
    if study.rewards or study.of_set:
        return runs
    return sorted(runs, key=lambda run: -mean(_gain(each) for each in runs if each["label"] == run["label"]))


def _gain(run: Run) -> float:
    return float(run["held_out"][-1] - run["held_out"][0])


def _gains(study: Study, runs: list[Run]) -> list[str]:
    lines = ["| | images | before | gain | of each seed |", "|---|---|---|---|---|"]
    for label, of_label in _by_label(by_gain(study, runs)).items():
        gains = [_gain(run) for run in of_label]
        lines.append(
            f"| {label} | {of_label[0]['images'][-1]:,} | {of_label[0]['held_out'][0]:.3f} | {_spread(gains)} | "
            f"{', '.join(f'{gain:+.3f}' for gain in gains)} |"
        )
    return lines


def _several_rewards(study: Study, runs: list[Run]) -> list[str]:
    names = " | ".join(study.rewards)
    lines = [f"| | images | {names} |", "|---|---|" + "---|" * len(study.rewards)]
    before = " | ".join(f"{runs[0]['rewards'][name][0]:.3f}" for name in study.rewards)
    lines.append(f"| before | 0 | {before} |")
    for label, of_label in _by_label(runs).items():
        ends = " | ".join(_spread([run["rewards"][name][-1] for run in of_label], "") for name in study.rewards)
        lines.append(f"| {label} | {of_label[0]['images'][-1]:,} | {ends} |")
    return lines


def _sets(study: Study, runs: list[Run]) -> list[str]:
    """Each number before and at the end."""
    lines = [f"| | images | score | {' | '.join(study.of_set)} |", "|---|---|---|" + "---|" * len(study.of_set)]
    for label, of_label in _by_label(runs).items():
        series = [
            [run["held_out"] for run in of_label],
            *([r["of_set"][name] for r in of_label] for name in study.of_set),
        ]
        ways = (
            f"{mean(each[0] for each in of_runs):.3f} → {_spread([each[-1] for each in of_runs], '')}"
            for of_runs in series
        )
        lines.append(f"| {label} | {of_label[0]['images'][-1]:,} | {' | '.join(ways)} |")
    return lines


def _spread(values: list[float], sign: str = "+") -> str:
    middle = f"{mean(values):{sign}.3f}"
    return f"{middle} ± {stdev(values):.3f}" if len(values) > 1 else middle


def _by_label(runs: list[Run]) -> dict[str, list[Run]]:
    return {label: [run for run in runs if run["label"] == label] for label in dict.fromkeys(r["label"] for r in runs)}


def _draw(study: Study, runs: list[Run], path: Path) -> None:
    if study.of_set:
        draw_set(runs, study.of_set, study.title, path)
    elif study.rewards:
        first, second = study.rewards
        draw_front(runs, (first, second), study.title, path)
    else:
        draw_spread(runs, study.title, path)
