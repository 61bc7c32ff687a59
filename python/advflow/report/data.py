"""Reads a run's folder into plain numbers, tolerating what a killed or diverged run leaves behind."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from advflow.run.log import EVALS, METRICS, SAMPLE_PROMPTS, SAMPLES, read_rows
from advflow.settings.config import config_class
from advflow.settings.numbers import flatten
from advflow.settings.yaml_files import read_yaml

_MOST_GRIDS = 12
_GRID_WIDTH = 760  # pixels; what a half-width column shows on a dense screen
_GRID_BYTES = 52_000  # twelve of these in base64, and the charts, stay below 1 MB
_MAPPINGS = ("categories", "rewards", "distribution")  # of an evaluation
_QUALITIES = (92, 80, 65, 50)

T = TypeVar("T")
Row = dict[str, Any]


@dataclass(frozen=True)
class Grid:
    """One sample grid: `uri` is a data: address, `width` and `height` are pixels of the file in the run's folder."""

    iteration: int
    uri: str
    width: int
    height: int


@dataclass(frozen=True)
class Run:
    """What is known about a run.

    `config` maps dotted names to values. `metrics` and `evals` are rows in order of `iteration`; a metrics row's
    iteration counts from 0, an evaluation's is how many iterations were done before it. `sample_prompts` are those of
    every sample grid, row by row; none for a run that did not note them.
    """

    name: str
    config: dict[str, Any]
    metrics: list[Row]
    evals: list[Row]
    grids: list[Grid]
    sample_prompts: list[str]
    summary: dict[str, Any]

    @property
    def iterations(self) -> int:
        """Iterations that were asked for."""
        return int(self.config["iterations"])

    @property
    def done(self) -> int:
        """Iterations that were finished."""
        return max([row["iteration"] + 1 for row in self.metrics] + [row["iteration"] for row in self.evals], default=0)

    @property
    def finished(self) -> bool:
        return bool(self.summary) and self.done >= self.iterations

    @property
    def images(self) -> int | None:
        """Training images drawn so far, those of candidate prompts among them."""
        prompts, group = (self.config.get(f"rollout.{name}") for name in ("prompts", "images_per_prompt"))
        candidates = self.config.get("capability.candidates") or 0
        return (
            self.done * (prompts * group + candidates) if isinstance(prompts, int) and isinstance(group, int) else None
        )

    @property
    def seconds(self) -> float | None:
        """Wall time: the run's own count, else that of its last evaluation and of the iterations since."""
        if self.finished and (total := number(self.summary.get("seconds"))) is not None:
            return total
        last = self.evals[-1] if self.evals else {"iteration": 0, "seconds": 0.0}
        since = (_duration(row) or 0.0 for row in self.metrics if row["iteration"] >= last["iteration"])
        total = (number(last.get("seconds")) or 0.0) + sum(since)
        return total or None

    @property
    def iteration_seconds(self) -> tuple[float, float] | None:
        """Mean seconds of an iteration's rollout and of its update, over the iterations that logged both."""
        timed = [row for row in self.metrics if _duration(row) is not None]
        rollout, train = (sum(row[f"seconds_{part}"] for row in timed) for part in ("rollout", "train"))
        return (rollout / len(timed), train / len(timed)) if timed else None

    @property
    def training_seconds(self) -> float | None:
        """Seconds in iterations, as far as all of them logged theirs; the rest of the wall time is evaluation."""
        durations = [_duration(row) for row in self.metrics]
        known = [each for each in durations if each is not None]
        return sum(known) if known and len(known) == len(durations) == self.done else None

    @property
    def categories(self) -> list[str]:
        """Names of the held-out categories, in the order in which they were evaluated."""
        return list(dict.fromkeys(name for row in self.evals for name in row["categories"]))

    @property
    def rewards(self) -> list[str]:
        """Names of several rewards that were evaluated, in their order; none of one alone."""
        return list(dict.fromkeys(name for row in self.evals for name in row["rewards"]))

    def reward_scores(self, name: str) -> list[float | None]:
        """Held-out score of one of several rewards in every evaluation."""
        return [number(row["rewards"].get(name, {}).get("overall")) for row in self.evals]

    @property
    def numbers_of_sets(self) -> list[str]:
        """Names of what was found of the held-out images together; none where they are not compared with real ones."""
        return list(dict.fromkeys(name for row in self.evals for name in row["distribution"]))

    def of_sets(self, name: str) -> list[float | None]:
        """One of these numbers in every evaluation."""
        return [number(row["distribution"].get(name)) for row in self.evals]

    @property
    def best(self) -> tuple[float, int] | None:
        """The highest overall held-out score and the iteration that first reached it."""
        pairs = zip(self.scores(), self.evals, strict=True)
        scored = [(score, row["iteration"]) for score, row in pairs if score is not None]
        return max(scored, key=lambda pair: (pair[0], -pair[1]), default=None)

    def ends(self, category: str | None = None) -> tuple[float | None, float | None]:
        """Held-out score before training and at the last evaluation."""
        scores = self.scores(category)
        return (scores[0], scores[-1]) if scores else (None, None)

    def scores(self, category: str | None = None) -> list[float | None]:
        """Held-out score of every evaluation, of one category or overall."""
        rows = self.evals
        return [number(row.get("overall") if category is None else row["categories"].get(category)) for row in rows]


def load_run(folder: Path) -> Run:
    """Reads what is there. Only config.yaml has to be."""
    path = folder / "config.yaml"
    if not path.is_file():
        raise FileNotFoundError(f"{str(folder)!r} is not the folder of a run: there is no {path}")
    config = read_yaml(path, "the config of a run")
    iterations = config.get("iterations")
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
        raise ValueError(f"{path} is not the config of a run: it does not say how many iterations")
    evals = [
        row | {name: value if isinstance(value := row.get(name), dict) else {} for name in _MAPPINGS}
        for row in _numbered(read_rows(folder / EVALS))
    ]
    summary = _load_json(folder / "summary.json")
    settings = flatten(config)
    random = " (RANDOM WEIGHTS)" if settings.get("model.random_weights") else ""
    return Run(
        name=f"{folder.resolve().name}{random}",
        config=settings,
        metrics=_numbered(read_rows(folder / METRICS)),
        evals=evals,
        grids=_load_grids(folder / SAMPLES),
        sample_prompts=_load_prompts(folder / SAMPLES / SAMPLE_PROMPTS),
        summary=summary if isinstance(summary, dict) else {},
    )


def default_config() -> dict[str, Any]:
    """What every setting is when nobody sets it, by dotted name."""
    return flatten(asdict(config_class()()))


def number(value: object) -> float | None:
    """`value` as a finite float, None for anything else."""
    if isinstance(value, int | float) and math.isfinite(value):
        return float(value)
    return None


def evenly_spaced(items: Sequence[T], count: int) -> list[T]:
    """At most `count` (2 or more) of `items`, the first and the last among them."""
    if len(items) <= count:
        return list(items)
    return [items[round(index * (len(items) - 1) / (count - 1))] for index in range(count)]


def _duration(row: Row) -> float | None:
    rollout, train = number(row.get("seconds_rollout")), number(row.get("seconds_train"))
    return None if rollout is None or train is None else rollout + train


def _numbered(rows: list[Row]) -> list[Row]:
    """One row an iteration, in their order; the last one counts, as after a run that was continued."""
    numbered = {
        row["iteration"]: row for row in rows if isinstance(row, dict) and isinstance(row.get("iteration"), int)
    }
    return [numbered[iteration] for iteration in sorted(numbered)]


def _load_prompts(path: Path) -> list[str]:
    prompts = _load_json(path)
    return [str(prompt) for prompt in prompts] if isinstance(prompts, list) else []


def _load_json(path: Path) -> Any:
    """What a file of JSON holds; None where there is none, or half of one."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def _load_grids(folder: Path) -> list[Grid]:
    paths = sorted((path for path in folder.glob("*.png") if path.stem.isdecimal()), key=lambda path: int(path.stem))
    return [grid for path in evenly_spaced(paths, _MOST_GRIDS) if (grid := _load_grid(path)) is not None]


def _load_grid(path: Path) -> Grid | None:
    try:
        with Image.open(path) as opened:
            picture = opened.convert("RGB")
    except OSError:
        return None  # the run may be writing it at this moment, or was killed while it did
    width, height = picture.size
    if width > _GRID_WIDTH:
        picture = picture.resize((_GRID_WIDTH, max(1, round(height * _GRID_WIDTH / width))), Image.Resampling.LANCZOS)
    encoded = _encode(picture, lossless=True)
    for quality in _QUALITIES:
        if len(encoded) <= _GRID_BYTES:
            break
        encoded = _encode(picture, quality=quality)
    return Grid(int(path.stem), "data:image/webp;base64," + base64.b64encode(encoded).decode(), width, height)


def _encode(picture: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "webp", method=4, **options)
    return buffer.getvalue()
