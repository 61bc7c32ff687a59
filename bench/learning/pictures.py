"""Pictures of training runs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

Run = dict[str, Any]


def draw_runs(runs: list[Run], path: Path) -> None:
    """Each run a line: its held-out score, its gradient norm, and its distance from the reference where it has one."""
    colors = _colors(runs)
    height = 4.2 + 0.25 * ((len(colors) + 3) // 4)  # the legend below has four columns
    apart = [run for run in runs if any(run.get("reference_deviation", []))]  # 0 where the reference has no weight
    panels = 3 if apart else 2
    figure, (score, norm, *rest) = plt.subplots(1, panels, figsize=(5 * panels, height), layout="constrained")
    for run in runs:
        first = run is next(r for r in runs if r["label"] == run["label"])
        label = run["label"] if first else None
        color = colors[run["label"]]
        score.plot(run["iterations"], run["held_out"], marker="o", markersize=3, color=color, alpha=0.85, label=label)
        norm.plot(run["grad_norm"], color=color, alpha=0.6, linewidth=0.9)
    score.set(xlabel="iteration", ylabel="held-out score", title="Held-out score (each line one seed)")
    norm.set(xlabel="iteration", ylabel="gradient norm", title="Gradient norm before clipping", yscale="log")
    for distance in rest:
        for run in apart:
            distance.plot(run["reference_deviation"], color=colors[run["label"]], alpha=0.6, linewidth=0.9)
        distance.set(xlabel="iteration", title="Mean squared distance from the reference velocity", yscale="log")
    _plain(score, norm, *rest)
    score.set_ylim(bottom=0)
    figure.legend(loc="outside lower center", ncols=min(4, len(colors)), frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_spread(runs: list[Run], title: str, path: Path) -> None:
    """The held-out score of each label over images drawn, mean and range of its seeds, and each run's gain."""
    colors = _colors(runs)
    figure, (curves, gains) = plt.subplots(
        1, 2, figsize=(11, 3.4 + 0.16 * len(colors)), layout="constrained", width_ratios=(3, 2)
    )
    for place, (label, color) in enumerate(colors.items()):
        of_label = [run for run in runs if run["label"] == label]
        scores = np.array([run["held_out"] for run in of_label])
        images = of_label[0]["images"]
        _mean_and_range(curves, images, scores, color, label)
        gain = scores[:, -1] - scores[:, 0]
        gains.plot(gain, [place] * len(gain), "o", markersize=5, color=color, alpha=0.7)
        gains.plot(gain.mean(), place, "|", markersize=16, markeredgewidth=2.5, color=color)
    figure.suptitle(title)
    curves.set(xlabel="images drawn", ylabel="held-out score", title="mean and range of seeds")
    gains.set_yticks(range(len(colors)), list(colors))
    for name, color in zip(gains.get_yticklabels(), colors.values(), strict=True):
        name.set_color(color)
    gains.invert_yaxis()
    gains.set(xlabel="gain of the held-out score", title="each seed, and the mean")
    gains.axvline(0, color="black", linewidth=0.8)
    _plain(curves, gains)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_set(runs: list[Run], names: tuple[str, ...], title: str, path: Path) -> None:
    """The held-out score and numbers of all held-out images together over images drawn, mean and range of seeds."""
    colors = _colors(runs)
    panels = ("score", *names)
    figure, all_axes = plt.subplots(1, len(panels), figsize=(3.2 * len(panels), 3.8), layout="constrained")
    for axes, name in zip(all_axes, panels, strict=True):
        for label, color in colors.items():
            of_label = [run for run in runs if run["label"] == label]
            values = np.array([run["held_out"] if name == "score" else run["of_set"][name] for run in of_label])
            images = of_label[0]["images"]
            _mean_and_range(axes, images, values, color, label)
        axes.set(xlabel="images drawn", title=name)
    _plain(*all_axes)
    figure.suptitle(f"{title}: mean and range of seeds", fontsize=11)
    figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_front(runs: list[Run], rewards: tuple[str, str], title: str, path: Path) -> None:
    """Each run from its first to its last evaluation, in the plane of two rewards."""
    colors = _colors(runs)
    figure, axes = plt.subplots(figsize=(7.5, 5.2), layout="constrained")
    for run in runs:
        x, y = (run["rewards"][name] for name in rewards)
        axes.plot(x, y, color=colors[run["label"]], alpha=0.35, linewidth=1)
        axes.plot(x[-1], y[-1], "o", color=colors[run["label"]], markersize=7)
    for label, color in colors.items():
        axes.plot([], [], "o", color=color, label=label)
    axes.plot(*([runs[0]["rewards"][name][0]] for name in rewards), "k*", markersize=13, label="before")
    axes.set(xlabel=rewards[0], ylabel=rewards[1])
    figure.suptitle(f"{title}: every seed's way and end", fontsize=11)
    _plain(axes)
    figure.legend(loc="outside right center", frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _mean_and_range(axes: Axes, images: list[int], values: np.ndarray, color: Any, label: str) -> None:
    """Of `values`, a row a seed."""
    axes.plot(images, values.mean(0), marker="o", markersize=3, color=color, label=label)
    axes.fill_between(images, values.min(0), values.max(0), color=color, alpha=0.15, linewidth=0)


def _colors(runs: Iterable[Run]) -> dict[str, Any]:
    labels = list(dict.fromkeys(run["label"] for run in runs))
    palette = matplotlib.color_sequences["tab10" if len(labels) <= 10 else "tab20"]
    return dict(zip(labels, palette, strict=False))


def _plain(*panels: Axes) -> None:
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
