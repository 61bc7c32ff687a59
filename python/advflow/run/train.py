"""`advflow train`, from its settings to its summary."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from advflow.algorithms import check_settings
from advflow.core.backends import backends
from advflow.core.ranks import Ranks
from advflow.run.checkpoint import checkpoints, load_newest
from advflow.run.folder import FolderLock, check_folder, make_folder, write_config
from advflow.run.interrupt import StopRequest
from advflow.run.run import CHECKPOINTS, Run
from advflow.run.trackers import check_trackers
from advflow.run.trainer import Trainer
from advflow.settings.config import TrainConfig


def train(config: TrainConfig, resume: bool, ranks: Ranks | None = None) -> dict[str, Any]:
    """Runs `advflow train`, as one of `ranks`; returns the summary it also writes to summary.json.

    Nothing is written before settings, prompts, reward, model and checkpoint have proved usable. Raises ValueError
    where they are not, and SystemExit where a signal has ended the run early.
    """
    folder, stop, ranks = Path(config.out), StopRequest(), ranks or Ranks()
    check_settings(config.algorithm, config.method, config.rollout.images_per_prompt)
    check_folder(config, resume)
    check_trackers(config.tracking)
    new = ranks.any(not folder.exists())
    runtime = config.runtime
    with FolderLock(folder) as lock, backends(runtime.attention, runtime.tf32):
        if ranks.first and not new:
            lock.take()
        settings = _without_start(config) if resume and checkpoints(folder / CHECKPOINTS) else config
        trainer = Trainer(settings, stop.check, ranks)
        first = _restore(trainer, folder) if resume else 0
        ranks.wait()
        if ranks.first:
            if new:
                make_folder(config)
                lock.take()
                check_folder(config, resume=False)  # another process may have been faster, and done already
            write_config(config)
        ranks.wait()
        return Run(trainer, first, stop).finish()


def _without_start(config: TrainConfig) -> TrainConfig:
    """A checkpoint holds what has become of `model.lora_start`, which may be gone by then."""
    return replace(config, model=replace(config.model, lora_start=None))


def _restore(trainer: Trainer, folder: Path) -> int:
    """Restores the newest whole checkpoint, if any; returns the iteration to run next."""
    done = load_newest(folder / CHECKPOINTS, trainer.parts) or 0
    if done > trainer.config.iterations:
        raise ValueError(
            f"iterations is {trainer.config.iterations}; the run in {trainer.config.out!r} has done {done}, "
            "so accepted are that many or more"
        )
    return done
