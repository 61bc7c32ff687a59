"""Collects training runs into one result file and one picture.

python -m bench.learning --json bench/results/learning.json --png docs/images/learning.png LABEL=RUN_FOLDER ...

Runs with the same label (other seeds) share a colour. Every picture of learning in the docs is made this way.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import yaml

_WHERE_ON = (
    "gamma",
    "learner_move",
    "candidate_reward",
    "capability_mean",
    "kept_distance",
    "two_sided_groups",
    "sign_flips",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.learning", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="LABEL=FOLDER", help="a label and the folder of a run")
    parser.add_argument("--json", type=Path, required=True, help="where the collected numbers go")
    parser.add_argument("--png", type=Path, required=True, help="where the picture goes")
    arguments = parser.parse_args()
    runs = [_collect(*_split(word, parser)) for word in arguments.runs]
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text("[\n" + ",\n".join(map(json.dumps, runs)) + "\n]\n")  # a run a line
    arguments.png.parent.mkdir(parents=True, exist_ok=True)
    _draw(runs, arguments.png)
    for run in runs:
        best = max(run["held_out"])
        print(
            f"{run['label']:<28} seed {run['seed']}  {run['held_out'][0]:.3f} -> {run['held_out'][-1]:.3f} "
            f"({run['held_out'][-1] - run['held_out'][0]:+.3f}, best {best:.3f})  {run['iterations'][-1]} iterations"
        )


def _split(word: str, parser: argparse.ArgumentParser) -> tuple[str, Path]:
    label, equals, folder = word.rpartition("=")
    if not equals or not (Path(folder) / "evals.jsonl").is_file():
        parser.error(f"{word!r} is not LABEL=FOLDER with the folder of a run")
    return label, Path(folder)


def _collect(label: str, folder: Path) -> dict[str, Any]:
    config = yaml.safe_load((folder / "config.yaml").read_text())
    evals = [json.loads(line) for line in (folder / "evals.jsonl").read_text().splitlines()]
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    summary = folder / "summary.json"
    return {
        "label": label,
        "seed": config["seed"],
        "config": config | {"out": None},
        "iterations": [row["iteration"] for row in evals],
        "images": [row["images"] for row in evals],
        "held_out": [row["overall"] for row in evals],
        "categories": [row["categories"] for row in evals],
        "grad_norm": [row["grad_norm"] for row in metrics],
        "reward": [row["reward"] for row in metrics],
        # Logged by some methods and settings alone, and not in every iteration.
        **{
            name: [row.get(name) for row in metrics]
            for name in ("reference_deviation", "reference_scale", *_WHERE_ON)
            if any(name in row for row in metrics)
        },
        "summary": json.loads(summary.read_text()) if summary.is_file() else None,
    }


def _draw(runs: list[dict[str, Any]], path: Path) -> None:
    labels = list(dict.fromkeys(run["label"] for run in runs))
    palette = matplotlib.color_sequences["tab10" if len(labels) <= 10 else "tab20"]
    colors = dict(zip(labels, palette, strict=False))
    height = 4.2 + 0.25 * ((len(labels) + 3) // 4)  # the legend below has four columns
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
    for axes in (score, norm, *rest):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    score.set_ylim(bottom=0)
    figure.legend(loc="outside lower center", ncols=min(4, len(labels)), frameon=False)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
