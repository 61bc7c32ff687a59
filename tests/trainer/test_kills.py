"""kill -9 at any moment: every resume ends with the bits of the run that nobody killed."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from advflow.cli import main
from advflow.core import files as core_files
from advflow.core.files import append_line, write_atomically
from advflow.run import shards
from advflow.run.checkpoint import load_newest, save_checkpoint

from tests.trainer.runs import SMALL, assert_same_run, files

FILE_OPERATIONS = {"open", "shutil.copymode", "shutil.rmtree"} | {
    f"os.{name}" for name in ("chmod", "mkdir", "remove", "rename", "rmdir", "truncate")
}


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Countdown:
    """Kills this process when it is called for the `last` time."""

    def __init__(self, last: int) -> None:
        self.left = last

    def __call__(self) -> bool:
        self.left -= 1
        return self.left == 0


def die_before_a_file_operation(folder: Path, number: int) -> None:
    """Before the operation of this number on what is below `folder`, as Python's audit hooks tell them."""
    due, place = Countdown(number), str(folder)

    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        if event in FILE_OPERATIONS and place in str(arguments[0]) and due():
            die()

    sys.addaudithook(hear)


def die_within_a_write(number: int) -> None:
    """Half way through the write of this number, of text or of tensors."""
    due, write, save = Countdown(number), os.write, shards.save_file

    def half(handle: int, content: Any) -> int:
        if due():
            write(handle, content[: len(content) // 2])
            die()
        return write(handle, content)

    def half_of_tensors(tensors: Any, path: Path, metadata: Any) -> None:
        save(tensors, path, metadata)
        if due():
            os.truncate(path, path.stat().st_size // 2)
            die()

    core_files.os.write = half  # type: ignore[assignment]
    shards.save_file = half_of_tensors  # type: ignore[assignment]


def die_at_a_call(name: str, number: int) -> None:
    """When a method of the trainer is called for this time."""
    from advflow.run.trainer import Trainer

    due, method = Countdown(number), getattr(Trainer, name)

    def call(self: Trainer, *arguments: Any) -> Any:
        if due():
            die()
        return method(self, *arguments)

    setattr(Trainer, name, call)


def in_a_fork(run: Callable[[], None]) -> bool:
    """Whether a process of its own, a copy of this one, has been killed while it ran."""
    if (process := os.fork()) == 0:
        try:
            run()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL


class Number:
    """A part of one number and one tensor."""

    def __init__(self, value: int) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "weight": torch.full((100,), float(self.value))}

    def load_state_dict(self, state: Any) -> None:
        self.value = state["value"]
        assert torch.equal(state["weight"], self.state_dict()["weight"])


def _dies_at(kind: str, folder: Path, number: int) -> None:
    if kind == "write":
        die_within_a_write(number)
    else:
        die_before_a_file_operation(folder, number)


@pytest.mark.parametrize("kind", ["operation", "write"])
def test_whenever_its_writer_dies_a_checkpoint_is_the_old_or_the_new_one(kind: str, tmp_path: Path) -> None:
    def export(folder: Path) -> None:
        (folder / "transformer").mkdir()
        (folder / "transformer" / "config.json").write_text("{}")

    def save(folder: Path, iteration: int) -> None:
        save_checkpoint(folder, iteration, {"part": Number(iteration)}, export=export)

    found, number, killed = [], 0, True
    while killed:
        number += 1
        folder, part = tmp_path / str(number) / "checkpoints", Number(0)
        for iteration in (1, 2):
            save(folder, iteration)

        def third(folder: Path = folder, number: int = number) -> None:
            _dies_at(kind, folder, number)
            save(folder, 3)

        killed = in_a_fork(third)
        done = load_newest(folder, {"part": part})
        assert done == part.value and done in (2, 3)
        found.append(done)
        save(folder, 4)  # what was left is tidied up
        assert sorted(path.name for path in folder.iterdir()) == [f"{done:06d}", "000004"]
    assert found == sorted(found) and found[0] == 2 and found[-1] == 3 and number > (2 if kind == "write" else 20)


@pytest.mark.parametrize("kind", ["operation", "write"])
def test_whenever_its_writer_dies_a_file_is_whole(kind: str, tmp_path: Path) -> None:
    number, killed, found = 0, True, []
    while killed:
        number += 1
        folder = tmp_path / str(number)
        folder.mkdir()
        write_atomically(folder / "one", "old")
        append_line(folder / "rows", "first")

        def change(folder: Path = folder, number: int = number) -> None:
            _dies_at(kind, folder, number)
            append_line(folder / "rows", "second")
            write_atomically(folder / "one", "new")

        killed = in_a_fork(change)
        append_line(folder / "rows", "third")
        found.append(((folder / "one").read_text(), (folder / "rows").read_text()))
    stages = [("old", "first\nthird\n"), ("old", "first\nsecond\nthird\n"), ("new", "first\nsecond\nthird\n")]
    assert found == sorted(found, key=stages.index) and set(found) == set(stages)


# Of a run of four iterations, with checkpoints after each and evaluations after two.
WORDS = [*SMALL, "--iterations", "4", "--evaluation.every", "2", "--device", "cpu"]
KILLED_TIMES = [times for _ in range(10) for times in (1, 1, 2)]
KINDS: dict[str, tuple[Callable[..., None], int]] = {  # and how often each happens in the run
    "_sample": (die_at_a_call, 4),
    "_step": (die_at_a_call, 4),
    "evaluate": (die_at_a_call, 3),
    "operation": (_dies_at, 293),
    "write": (_dies_at, 25),
    "seconds": (die_at_a_call, 0),
}


def _train(folder: Path, kind: str | None, number: int) -> None:
    """In a process of its own: a run that is killed at a moment, or is not."""
    torch.set_num_threads(1)
    with (folder.parent / f"{folder.name}.log").open("a") as told:
        os.dup2(told.fileno(), 1)
        os.dup2(told.fileno(), 2)
    if kind in ("operation", "write"):
        _dies_at(kind, folder, number)
    elif kind is not None and kind != "seconds":
        die_at_a_call(kind, number)
    main(["train", "--out", str(folder), "--resume", *WORDS])


def _in_a_process(folder: Path, kind: str | None = None, number: int = 0) -> int | None:
    """Its exit code."""
    processes = multiprocessing.get_context("forkserver")  # which imports everything once
    processes.set_forkserver_preload(["advflow.run.train", "advflow.models.sd3", "advflow.report", __name__])
    process = processes.Process(target=_train, args=(folder, kind, number))
    process.start()
    if kind == "seconds":
        time.sleep(number / 100)
        process.kill()
    process.join()
    return process.exitcode


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert _in_a_process(folder) == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("case", range(len(KILLED_TIMES)))
def test_every_resume_ends_with_the_bits_of_the_run_that_nobody_killed(case: int, whole: Path, tmp_path: Path) -> None:
    """Forty kills in thirty runs, by a seeded schedule: at a call, at a file operation, within a write, at any time."""
    chosen, folder = random.Random(case), tmp_path / "run"
    kind = chosen.choice(list(KINDS))
    number = chosen.randint(1, KINDS[kind][1] or 400)
    while (code := _in_a_process(folder, kind, number)) == 0:  # it was over before it was killed
        shutil.rmtree(folder)
        assert number > 1, f"the first {kind} has not killed it"
        number //= 2
    assert code == -signal.SIGKILL
    if KILLED_TIMES[case] == 2:  # and once more, while it finds out where it was
        assert _in_a_process(folder, "operation", chosen.randint(1, 20)) == -signal.SIGKILL
    assert _in_a_process(folder) == 0
    assert_same_run(whole, folder)
    for name in ("checkpoints/000004", "samples"):
        assert files(folder / name) == files(whole / name)
    assert not list(folder.rglob("*.partial")) and not (folder / ".lock").exists()
