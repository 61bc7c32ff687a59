"""What a run leaves behind while it goes: kernels.json, metrics.jsonl, evals.jsonl, sample grids, TensorBoard."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from advflow.core.files import append_line, write_atomically

if TYPE_CHECKING:  # the report reads these files without loading any model code
    from advflow.models.family import FusedKernels
    from advflow.run.evaluate import Evaluation
    from advflow.run.trackers import Trackers

METRICS = "metrics.jsonl"
EVALS = "evals.jsonl"
KERNELS = "kernels.json"
SAMPLES = "samples"
SAMPLE_PROMPTS = "prompts.json"  # beside the sample grids
_CELL = 96  # pixels; small images are enlarged to this by whole factors


class RunLog:
    """Appends rows to the files of a run. Rows from `iteration` on, left by a killed run, are dropped first."""

    def __init__(self, folder: Path, iteration: int, trackers: Trackers | None = None) -> None:
        self._folder, self._trackers = folder, trackers
        (folder / SAMPLES).mkdir(parents=True, exist_ok=True)
        _truncate(folder / METRICS, lambda row: row["iteration"] < iteration)
        _truncate(folder / EVALS, lambda row: row["iteration"] <= iteration)
        self._tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=iteration or None)

    def kernels(self, kernels: FusedKernels | None) -> str:
        """Notes which modules of the transformer run on fused kernels, which do not and why. Returns it in a line."""
        found: dict[str, dict[str, Any]] = {"replaced": {}, "kept": {}}
        if kernels is not None:
            found = {"replaced": dict(kernels.replaced), "kept": dict(kernels.kept)}
        write_atomically(self._folder / KERNELS, json.dumps(found, indent=2) + "\n")
        told = [f"{op} in {count} modules" for op, count in found["replaced"].items()] or ["none"]
        names: dict[str, list[str]] = {}
        for name, reason in found["kept"].items():
            names.setdefault(reason, []).append(name)
        for reason, kept in names.items():
            more = f" and {len(kept) - 1} more" if len(kept) > 1 else ""
            told.append(f"kept {kept[0]}{more}: {reason}")
        line = f"fused kernels: {'; '.join(told)}"
        self._tensorboard.add_text("kernels", line)
        return line

    def metrics(self, row: dict[str, Any]) -> None:
        """Appends one iteration's numbers."""
        self._append(METRICS, row)
        if self._trackers is not None:
            told = {f"train/{name}": value for name, value in row.items() if name != "iteration"}
            self._trackers.log(told, row["iteration"] + 1)
        for name, value in row.items():
            if name != "iteration":
                self._tensorboard.add_scalar(f"train/{name}", value, row["iteration"])

    def evaluated(self, iteration: int) -> bool:
        """Whether the evaluation before this iteration has been made."""
        return any(row["iteration"] == iteration for row in read_rows(self._folder / EVALS))

    def evaluation(self, iteration: int, images_seen: int, seconds: float, result: Evaluation, grid: list[int]) -> None:
        """Appends one evaluation and saves the images number `grid` as a picture."""
        row: dict[str, Any] = {
            "iteration": iteration,
            "images": images_seen,
            "seconds": round(seconds, 2),
            "overall": result.overall,
            "reward": result.reward,
            "categories": result.categories,
            "unscored": result.unscored,
        }
        if result.each:
            row["rewards"] = {name: vars(each) for name, each in result.each.items()}
        if result.distribution:
            row["distribution"] = result.distribution
        picture = image_grid(result.images[grid], columns=max(1, len(grid) // max(1, len(result.categories))))
        write_atomically(self._folder / SAMPLES / f"{iteration:06d}.png", as_png(picture))
        self._append(EVALS, row)  # last: an evaluation that has its row is not made again
        told = {"held_out/overall": result.overall}
        told |= {f"held_out/{name}": value for name, value in result.categories.items()}
        told |= {f"held_out_rewards/{name}": each.overall for name, each in result.each.items()}
        told |= {f"held_out_distribution/{name}": value for name, value in result.distribution.items()}
        for name, value in told.items():
            self._tensorboard.add_scalar(name, value, iteration)
        self._tensorboard.flush()
        if self._trackers is not None:
            self._trackers.log(told, iteration)
            self._trackers.picture("held_out/samples", picture, iteration)

    def sample_prompts(self, prompts: list[str]) -> None:
        """Notes the prompts of the sample grids, in the order of their images."""
        write_atomically(self._folder / SAMPLES / SAMPLE_PROMPTS, json.dumps(prompts))

    def close(self) -> None:
        self._tensorboard.close()
        if self._trackers is not None:
            self._trackers.close()

    def _append(self, name: str, row: dict[str, Any]) -> None:
        append_line(self._folder / name, to_json(row))


class NoLog(RunLog):
    """Of a process that is not the one that writes."""

    def __init__(self) -> None:
        pass

    def kernels(self, kernels: FusedKernels | None) -> str:
        return ""

    def metrics(self, row: dict[str, Any]) -> None:
        pass

    def evaluated(self, iteration: int) -> bool:
        return False

    def evaluation(self, iteration: int, images_seen: int, seconds: float, result: Evaluation, grid: list[int]) -> None:
        pass

    def sample_prompts(self, prompts: list[str]) -> None:
        pass

    def close(self) -> None:
        pass


def to_json(value: dict[str, Any], indent: int | None = None) -> str:
    """`value` as JSON, which knows neither NaN nor infinities: they become null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def best_iteration(folder: Path) -> int | None:
    """How many iterations the run in `folder` had done at its best held-out score, the base aside; None without any."""
    scores = {row["iteration"]: row["overall"] for row in read_rows(folder / EVALS) if row["iteration"] > 0}
    scores = {iteration: score for iteration, score in scores.items() if score is not None and math.isfinite(score)}
    return max(scores, key=lambda iteration: (scores[iteration], -iteration), default=None)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a .jsonl file; none where there is no file. A last line cut off by a kill is ignored."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        if not line:
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def image_grid(images: torch.Tensor, columns: int) -> Image.Image:
    """Images [N, 3, H, W] in [0, 1] side by side, `columns` in a row, small ones enlarged without smoothing."""
    count, _, height, width = images.shape
    factor = max(1, _CELL // max(height, width))
    rows = -(-count // columns)
    gap = 4
    cell_height, cell_width = height * factor + gap, width * factor + gap
    canvas = Image.new("RGB", (columns * cell_width + gap, rows * cell_height + gap), "white")
    pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    for index in range(count):
        tile = Image.fromarray(pixels[index]).resize((width * factor, height * factor), Image.Resampling.NEAREST)
        row, column = divmod(index, columns)
        canvas.paste(tile, (gap + column * cell_width, gap + row * cell_height))
    return canvas


def as_png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "png")
    return buffer.getvalue()


def _truncate(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    if path.is_file():
        write_atomically(path, "".join(to_json(row) + "\n" for row in read_rows(path) if keep(row)))
