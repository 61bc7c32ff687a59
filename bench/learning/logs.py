"""What is kept of a training run: its settings, its evaluations, and of its metrics those that pictures show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

# Logged by some methods and settings alone, and not in every iteration.
_SOMETIMES = (
    "target_error",
    "reference_deviation",
    "reference_scale",
    "gamma",
    "learner_move",
    "candidate_reward",
    "capability_mean",
    "kept_distance",
    "two_sided_groups",
    "sign_flips",
)


def read_run(label: str, folder: Path) -> dict[str, Any]:
    """The run in `folder`, finished or not."""
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
        **({"rewards": _by_name(evals)} if "rewards" in evals[0] else {}),
        **({"of_set": _of_set(evals)} if "distribution" in evals[0] else {}),
        "grad_norm": [row["grad_norm"] for row in metrics],
        "reward": [row["reward"] for row in metrics],
        **{name: [row.get(name) for row in metrics] for name in _SOMETIMES if any(name in row for row in metrics)},
        "summary": json.loads(summary.read_text()) if summary.is_file() else None,
    }


def _of_set(evals: list[dict[str, Any]]) -> dict[str, list[float]]:
    return {name: [row["distribution"][name] for row in evals] for name in evals[0]["distribution"]}


def _by_name(evals: list[dict[str, Any]]) -> dict[str, list[float]]:
    return {name: [row["rewards"][name]["overall"] for row in evals] for name in evals[0]["rewards"]}
