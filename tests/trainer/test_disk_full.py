"""A full disk: a sentence, what was there before, whole files, and the same bits when there is room again."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from advflow.cli import main
from advflow.core import files as core_files
from advflow.core.files import append_line, write_atomically
from advflow.core.provenance import STARTS
from advflow.core.tensor_files import as_os_errors
from advflow.run import shards
from advflow.run.checkpoint import checkpoints, load_checkpoint, load_newest, save_checkpoint
from advflow.run.log import EVALS, METRICS
from advflow.run.state import weights_of
from advflow.run.trainer import Trainer
from advflow.settings.sources import load_run_config
from PIL import Image
from safetensors import SafetensorError, safe_open

from tests.trainer.runs import SMALL, assert_same_run, files
from tests.trainer.test_kills import Number

# A run of three iterations that saves each, an adapter, so that there is a file of diffusers in its checkpoints.
WORDS = [*SMALL, *"--iterations 3 --evaluation.every 2 --model.trainable lora --model.lora_rank 2".split()]
SENTENCE = r"^advflow train: No space left on device(: .+)?; make room and go on with --resume, what was saved is"


class Full:
    """Lets a write, of text or tensors, fail half way through, and every later one until there is room."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
        self.left, self.on, self.failed_at = number, True, ""
        self._write, self._save = os.write, shards.save_file
        monkeypatch.setattr(core_files.os, "write", self._text)
        monkeypatch.setattr(shards, "save_file", self._tensors)

    def _is_full(self, place: str) -> bool:
        self.left -= 1
        if self.on and self.left <= 0:
            self.failed_at = self.failed_at or place
            return True
        return False

    def _text(self, handle: int, content: Any) -> int:
        place = os.readlink(f"/proc/self/fd/{handle}")
        if handle > 2 and self._is_full(place):
            self._write(handle, bytes(content)[: len(content) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        return self._write(handle, content)

    def _tensors(self, tensors: Any, path: Path, metadata: Any) -> None:
        if self._is_full(str(path)):
            path.write_bytes(b"half")
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        self._save(tensors, path, metadata)


def test_a_checkpoint_that_finds_no_room_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places: list[str] = []
    number = 0
    while not places or places[-1]:
        number += 1
        folder, part = tmp_path / str(number), Number(0)
        save_checkpoint(folder, 1, {"part": Number(1)})
        before = files(folder)
        with monkeypatch.context() as patch:
            full = Full(patch, number)
            try:
                save_checkpoint(folder, 2, {"part": Number(2)})
            except OSError as error:
                assert error.errno == errno.ENOSPC and ".000002.partial" in str(error.filename)
                assert files(folder) == before and [path.name for path in folder.iterdir()] == ["000001"]
                assert load_newest(folder, {"part": part}) == part.value == 1
        places.append(Path(full.failed_at).name)
    assert places == ["tensors.safetensors", ".state.json.partial", ""]


def test_a_row_that_finds_no_room_leaves_those_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (tmp_path / "rows", tmp_path / "one"):
        path.write_text("old\n")
    with monkeypatch.context() as patch:
        Full(patch, 1)
        for change in (append_line, write_atomically):
            with pytest.raises(OSError, match=r"No space left on device: '.*(rows|\.one\.partial)'"):
                change(tmp_path / ("rows" if change is append_line else "one"), "a new text")
    assert files(tmp_path) == {"rows": b"old\n", "one": b"old\n"}


@pytest.mark.parametrize("torn", ["", '{"iteration": 1, "rew', "x" * 100_000])
def test_a_torn_line_is_cut_off(torn: str, tmp_path: Path) -> None:
    path = tmp_path / "rows"
    path.write_text('{"iteration": 0}\n' + torn)
    append_line(path, '{"iteration": 1}')
    assert path.read_text() == '{"iteration": 0}\n{"iteration": 1}\n'
    path.write_text(torn)
    append_line(path, "{}")
    assert path.read_text() == "{}\n"


def test_what_a_full_device_says_becomes_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left") as caught:
        with as_os_errors(tmp_path):
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path))
    with pytest.raises(SafetensorError, match="another"), as_os_errors(tmp_path):
        raise SafetensorError("another")


def _assert_whole(folder: Path) -> list[str]:
    """Every file that a run has left can be read; returns the names of its checkpoints."""
    for name in (METRICS, EVALS, STARTS):
        if (folder / name).exists():
            assert all(json.loads(line) for line in (folder / name).read_text().splitlines())
    if (folder / "config.yaml").exists():
        assert yaml.safe_load((folder / "config.yaml").read_text())["iterations"] == 3
    for path in folder.rglob("*.json"):
        json.loads(path.read_text())
    for path in folder.rglob("*.png"):
        Image.open(path).load()
    for path in folder.rglob("*.safetensors"):
        with safe_open(path, "pt") as opened:
            assert list(opened.keys())
    if (folder / "report.html").exists():
        assert (folder / "report.html").read_text().endswith("</html>\n")
    assert not list(folder.rglob("*.partial")) and not (folder / ".lock").exists()
    saved = checkpoints(folder / "checkpoints")
    if saved:
        parts = weights_of(_trainer(folder).policies)
        assert all(load_checkpoint(path, parts, only=True) == int(path.name) for path in saved)
    return [path.name for path in saved]


TRAINERS: list[Trainer] = []


def _trainer(folder: Path) -> Trainer:
    if not TRAINERS:
        TRAINERS.append(Trainer(load_run_config(str(folder))))
    return TRAINERS[0]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    main(["train", "--out", str(folder), *WORDS])
    assert _assert_whole(folder) == ["000002", "000003"]
    return folder


def _run_until_full(folder: Path, make_room: Callable[[], None]) -> bool:
    """Whether a run ends with a sentence about the disk; it is then whole, and goes on when there is room."""
    try:
        main(["train", "--out", str(folder), *WORDS])
    except SystemExit as error:
        assert re.search(SENTENCE, str(error)), str(error)
        before = _assert_whole(folder)
        make_room()
        main(["train", "--out", str(folder), "--resume", *WORDS])
        assert _assert_whole(folder)[-1:] >= before[-1:]
        return True
    return False


@pytest.mark.slow
def test_every_write_of_a_run_may_fail(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after another, in a run of its own each. What TensorBoard and diffusers write is for the next test."""
    places: set[str] = set()
    for number in range(1, 100):
        folder = tmp_path / str(number) / "run"
        folder.parent.mkdir()
        with monkeypatch.context() as patch:
            full = Full(patch, number)
            failed = _run_until_full(folder, lambda full=full: setattr(full, "on", False))  # type: ignore[misc]
        assert_same_run(whole, folder)
        if not failed:
            break
        places.add(re.sub(r"\d{6}", "N", os.path.relpath(full.failed_at, folder)))
    assert places == {
        ".lock",
        ".config.yaml.partial",
        ".kernels.json.partial",
        ".report.html.partial",
        ".summary.json.partial",
        METRICS,
        EVALS,
        STARTS,
        "samples/.prompts.json.partial",
        "samples/.N.png.partial",
        "checkpoints/.N.partial/tensors.safetensors",
        "checkpoints/.N.partial/.state.json.partial",
    }


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Makes a file system of so many bytes, or changes its size."""
    place = tmp_path / "disk"
    place.mkdir()

    def resize(size: int) -> Path:
        how = "remount," if place.is_mount() else ""
        command = ["mount", "-t", "tmpfs", "-o", f"{how}size={size}", "tmpfs", str(place)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("this user may mount nothing")
        return place

    yield resize
    if place.is_mount():
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.slow
def test_a_file_system_may_be_full_at_any_point(whole: Path, disk: Callable[[int], Path]) -> None:
    """A real one, a little larger each time until a run fits."""
    needed = sum(path.stat().st_size for path in whole.rglob("*"))
    failures = 0
    for size in range(4096, 4 * needed, needed // 12):
        place = disk(size)
        folder = place / "run"
        failed = _run_until_full(folder, lambda: disk(8 * needed))  # type: ignore[arg-type, return-value]
        assert_same_run(whole, folder)
        subprocess.run(["umount", str(place)], check=True)
        failures += failed
        if not failed:
            break
    assert failures >= 10 and not failed
