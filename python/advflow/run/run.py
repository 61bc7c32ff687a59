"""A run from its first iteration, or the one it goes on with, to its summary: what is saved, scored and logged when."""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from advflow.core.files import write_atomically
from advflow.core.progress import show_progress
from advflow.core.provenance import commit, record_start, versions
from advflow.core.ranks import Ranks
from advflow.run.checkpoint import Kept, save_checkpoint
from advflow.run.interrupt import Interrupted, StopRequest
from advflow.run.log import EVALS, NoLog, RunLog, best_iteration, read_rows, to_json
from advflow.run.trackers import Trackers
from advflow.settings.config import TrainConfig

if TYPE_CHECKING:
    from advflow.data.prompt import Prompt
    from advflow.run.trainer import Trainer

CHECKPOINTS = "checkpoints"
SUMMARY = "summary.json"
GRID_COLUMNS = 6  # images of each category in the sample grids
_FRUITLESS_AT_MOST = 3  # iterations in a row without one image to learn from


class Run:
    """The iterations of `trainer` from number `first` on. Every state that is evaluated has been saved before.

    Of several processes the first writes, and what any of them is asked to do, all do.
    """

    def __init__(self, trainer: Trainer, first: int, stop: StopRequest) -> None:
        self._trainer, self._config, self._stop = trainer, trainer.config, stop
        self._folder, self._ranks = Path(self._config.out), trainer.ranks
        self._done = self._saved = first
        self._log = self._open_log() if self._ranks.first else NoLog()
        self._grid = _grid_indices(trainer.eval_prompts)
        self._log.sample_prompts([trainer.eval_prompts[index].text for index in self._grid])
        earlier = max((row["seconds"] for row in read_rows(self._folder / EVALS)), default=0.0)
        self._started = time.monotonic() - earlier
        self._fruitless = 0

    def _open_log(self) -> RunLog:
        tracking = self._config.tracking
        trackers = Trackers(tracking, self._folder, asdict(self._config)) if tracking.to else None
        return RunLog(self._folder, self._done, trackers)

    def finish(self) -> dict[str, Any]:
        """Runs what is left; returns the summary, which it also writes to summary.json.

        Raises SystemExit where a signal asks to stop early, ValueError where there is nothing left to learn from.
        """
        try:
            with self._stop.listening():
                anything_left = self._advance()
        except Interrupted:
            raise SystemExit(self._farewell()) from None
        finally:
            self._log.close()
        path = self._folder / SUMMARY
        if self._ranks.first and (anything_left or not path.is_file()):
            summary = summarise(self._config, self._folder, time.monotonic() - self._started, self._trainer.device)
            write_atomically(path, to_json(summary, indent=2) + "\n")
        self._ranks.wait()
        stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return stored

    def _advance(self) -> bool:
        """Whether anything was left to do."""
        first, last = self._done, self._config.iterations
        left = first < last
        if self._ranks.first:
            if left:
                record_start(self._folder, first)
            print(self._log.kernels(self._trainer.policies.kernels), file=sys.stderr)
        held_out = "-"
        self._stop.iteration = first + 1
        if self._is_evaluated(first) and not self._ranks.any(self._log.evaluated(first)):
            held_out, left = self._evaluate(), True
        progress = show_progress(range(first, last), initial=first, desc="train", silent=not self._ranks.first)
        for iteration in progress:
            self._stop.iteration = iteration + 1
            row = self._iterate(iteration)
            if self._is_evaluated(self._done):
                held_out = self._evaluate()
            progress.set_postfix(reward=f"{row['reward']:.3f}", held_out=held_out)
            if self._done < last and self._ranks.any(self._stop.asked):
                raise Interrupted
        return left

    def _iterate(self, iteration: int) -> dict[str, float]:
        """One iteration, logged, and saved where that is due."""
        try:
            row = self._trainer.iterate(iteration)
        except Interrupted:  # in the rollout: the learner is what it was after the iteration before
            self._save()
            raise
        self._log.metrics({"iteration": iteration} | row)
        self._done = iteration + 1
        due = self._is_evaluated(self._done) or self._done % self._config.checkpoint_every == 0
        if due or self._ranks.any(self._stop.asked):
            self._save()
        self._require_usable_images(row)
        return row

    def _is_evaluated(self, done: int) -> bool:
        return done % self._config.evaluation.every == 0 or done == self._config.iterations

    def _save(self) -> None:
        together = self._ranks if self._ranks.sharded else Ranks()
        if (self._ranks.first or self._ranks.sharded) and self._saved < self._done:
            config = self._config
            kept = Kept(config.checkpoints_kept, best_iteration(self._folder), config.checkpoints_kept_every)
            parts, export = self._trainer.parts, self._trainer.export
            save_checkpoint(self._folder / CHECKPOINTS, self._done, parts, kept, export, together)
            self._saved = self._done

    def _evaluate(self) -> str:
        """Scores the learner and logs it; returns the score for display."""
        result = self._trainer.evaluate(self._grid)
        if not math.isfinite(result.overall):
            raise ValueError(
                f"data.reward {self._config.data.reward!r} gave none of the {result.unscored} held-out images a finite "
                f"score after iteration {self._done}; there is nothing to report"
            )
        seconds = time.monotonic() - self._started
        shown = list(range(len(self._grid)))
        self._log.evaluation(self._done, self._done * self._config.images, seconds, result, shown)
        return f"{result.overall:.3f}" + (f" ({result.unscored} unscored)" if result.unscored else "")

    def _require_usable_images(self, row: dict[str, float]) -> None:
        """Ends a run that has nothing to learn from for several iterations on end."""
        broken, unscored = int(row["broken_images"]), int(row["unscored_images"])
        images = self._config.rollout.images
        self._fruitless = self._fruitless + 1 if broken + unscored == images else 0
        if self._fruitless == _FRUITLESS_AT_MOST:
            raise ValueError(
                f"no image of {_FRUITLESS_AT_MOST} iterations in a row could be learnt from: of {images} "
                f"in the last one, number {self._done}, {broken} are not finite and {unscored} got a reward from "
                f"data.reward {self._config.data.reward!r} that is not"
            )

    def _farewell(self) -> str:
        if self._done == 0:
            return "stopped before the first iteration was done; --resume starts it again"
        return f"stopped after iteration {self._done}, saved; go on with --resume"


def summarise(config: TrainConfig, folder: Path, seconds: float, device: torch.device) -> dict[str, Any]:
    """The numbers of a finished run."""
    evals = read_rows(folder / EVALS)
    base, final = evals[0], evals[-1]
    best = best_iteration(folder)
    return {
        "algorithm": config.algorithm,
        **({"random_weights": True} if config.model.random_weights else {}),
        "seed": config.seed,
        "base_score": base["overall"],
        "final_score": final["overall"],
        "gain": final["overall"] - base["overall"],
        "base_categories": base["categories"],
        "final_categories": final["categories"],
        "base_rewards": {name: each["overall"] for name, each in base.get("rewards", {}).items()},
        "final_rewards": {name: each["overall"] for name, each in final.get("rewards", {}).items()},
        "best_score": next(row["overall"] for row in evals if row["iteration"] == best),
        "best_iteration": best,
        "iterations": config.iterations,
        "images": final["images"],
        "seconds": round(seconds, 1),
        "device": str(device),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "commit": commit(),
    }


def _grid_indices(prompts: list[Prompt]) -> list[int]:
    """The first few evaluation prompts of each category."""
    by_category: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        by_category.setdefault(prompt.category, []).append(index)
    return [index for indices in by_category.values() for index in indices[:GRID_COLUMNS]]
