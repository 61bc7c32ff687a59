"""Checkpoints: safetensors and JSON, no pickle; a checkpoint folder exists only when it is complete.

Tensors are stored under the name of their part and their own, numbers in state.json below the name of their part.
Beside them lies what other programs load: the learner as `Policies.export` writes it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from advflow.core.files import flush_to_disk, write_atomically
from advflow.core.ranks import Ranks
from advflow.core.tensor_files import as_os_errors
from advflow.run.shards import TENSORS, read_tensors, write_tensors
from advflow.run.state import Part

_STATE = "state.json"
_DIGEST = "sha256"
_PARTIAL = ".partial"


class DamagedCheckpoint(ValueError):
    """A checkpoint that is not what was written."""


@dataclass(frozen=True)
class Kept:
    """Which checkpoints stay: the `newest` so many, that of iteration `best`, and those of multiples of `every`."""

    newest: int = 2
    best: int | None = None
    every: int | None = None

    def keeps(self, path: Path) -> bool:
        """Whether one that is not among the newest stays."""
        iteration = int(path.name)
        return iteration == self.best or (self.every is not None and iteration % self.every == 0)


def save_checkpoint(
    folder: Path,
    iteration: int,
    parts: Mapping[str, Part],
    kept: Kept = Kept(),
    export: Callable[[Path], None] | None = None,
    ranks: Ranks | None = None,
) -> Path:
    """Writes `parts`, the state after `iteration` iterations, and what `export` writes; removes what is not `kept`.

    `ranks` call it together: each writes what it holds of sharded parts, the first all else.
    """
    ranks = ranks or Ranks()
    target = folder / checkpoint_name(iteration)
    scratch = folder / f".{target.name}{_PARTIAL}"
    if ranks.first:
        _remove_partial(folder)
    ranks.wait()
    try:
        with as_os_errors(scratch):
            _write(scratch, iteration, parts, export, ranks)
        if ranks.first:
            shutil.rmtree(target, ignore_errors=True)
            os.replace(scratch, target)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)  # it takes room that others may lack
        raise
    if ranks.first:
        flush_to_disk(folder)
        _remove_stale(folder, kept)
    ranks.wait()
    return target


def _write(
    scratch: Path, iteration: int, parts: Mapping[str, Part], export: Callable[[Path], None] | None, ranks: Ranks
) -> None:
    scratch.mkdir(parents=True, exist_ok=True)
    tensors, others = _flatten(parts)
    written = write_tensors(scratch, tensors, ranks)
    if export is not None:
        export(scratch)
    if written is not None:
        flush_to_disk(written)
    ranks.wait()
    if not ranks.first:
        return
    stored = {"iteration": iteration, "parts": others}
    write_atomically(scratch / _STATE, json.dumps(stored | {_DIGEST: _digest(scratch, stored)}))
    for path in _files(scratch):
        shutil.copymode(scratch / _STATE, path)  # safetensors leaves its files to their owner alone
    for path in (*scratch.rglob("*"), scratch):
        flush_to_disk(path)


def _remove_partial(folder: Path) -> None:
    """What kills have left of checkpoints that were being written or removed."""
    for path in folder.glob(f".*{_PARTIAL}"):
        shutil.rmtree(path)


def _remove_stale(folder: Path, kept: Kept) -> None:
    for stale in checkpoints(folder)[: -kept.newest]:
        if not kept.keeps(stale):
            # Under another name first: a checkpoint half removed must not be taken for one that is damaged.
            shutil.rmtree(stale.rename(folder / f".{stale.name}{_PARTIAL}"))


def checkpoint_name(iteration: int) -> str:
    """The folder of the checkpoint made after `iteration` iterations."""
    return f"{iteration:06d}"


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints under `folder`, oldest first."""
    return [path for path in _numbered(folder) if (path / _STATE).is_file()]


def load_newest(folder: Path, parts: Mapping[str, Part], *, only: bool = False) -> int | None:
    """Restores the newest checkpoint under `folder` that is whole, naming those that are not.

    Returns the iteration to run next; None where there is no checkpoint. Raises ValueError where none of them is whole,
    or the newest whole one does not fit. `only` as in `load_checkpoint`.
    """
    damages: list[str] = []
    for path in reversed(_numbered(folder)):
        try:
            iteration = load_checkpoint(path, parts, only=only)
        except DamagedCheckpoint as error:
            damages.append(str(error))
            continue
        if damages:
            warnings.warn(f"{'; '.join(damages)}; going on from {path}", UserWarning, stacklevel=2)
        return iteration
    if damages:
        raise DamagedCheckpoint(f"no checkpoint can be read: {'; '.join(damages)}")
    return None


def load_checkpoint(path: Path, parts: Mapping[str, Part], *, only: bool = False) -> int:
    """Restores what `save_checkpoint` wrote, bit for bit; returns the iteration to run next.

    With `only`, other parts than these may be in the checkpoint. Raises DamagedCheckpoint, a ValueError, where it is no
    longer what was written, ValueError where it holds other parts, both before anything is restored; ValueError too
    where it is of another model.
    """
    iteration, stored = _read(path)
    if missing := parts.keys() - stored.keys():
        raise ValueError(f"checkpoint {path} does not fit this run: it has no part {min(missing)!r}")
    if (unknown := stored.keys() - parts.keys()) and not only:
        raise ValueError(
            f"checkpoint {path} does not fit this run: it has a part {min(unknown)!r}, which nothing in this run goes "
            f"on from; its parts are {', '.join(sorted(parts))}"
        )
    for name, part in parts.items():
        try:
            part.load_state_dict(stored[name])
        except (ValueError, KeyError) as error:
            raise ValueError(f"checkpoint {path} does not fit this run: of its part {name!r}, {error}") from error
    return iteration


def _numbered(folder: Path) -> list[Path]:
    return sorted((path for path in folder.glob("[0-9]*") if path.name.isdecimal()), key=lambda path: int(path.name))


def _read(path: Path) -> tuple[int, dict[str, dict[str, Any]]]:
    """Iteration and parts of the checkpoint at `path`, compared with the checksum that older ones do not have."""
    for name in (_STATE, TENSORS):
        if not (path / name).is_file():
            raise DamagedCheckpoint(f"checkpoint {path} is damaged: it has no {name}")
    try:
        state = json.loads((path / _STATE).read_text(encoding="utf-8"))
        digest = state.pop(_DIGEST, None)
        iteration, parts = _unpacked(state)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise DamagedCheckpoint(f"checkpoint {path} is damaged: {_STATE} cannot be read") from error
    if digest is not None and digest != _digest(path, state):
        raise DamagedCheckpoint(f"checkpoint {path} is damaged: its files are not those that were written")
    try:
        tensors = read_tensors(path)
    except SafetensorError as error:
        raise DamagedCheckpoint(f"checkpoint {path} is damaged: {TENSORS} cannot be read ({error})") from error
    for name, tensor in tensors.items():
        part, _, key = name.partition(".")
        parts.setdefault(part, {})[key] = tensor
    return iteration, parts


def _unpacked(state: dict[str, Any]) -> tuple[int, dict[str, dict[str, Any]]]:
    """Iteration and plain values by part. Checkpoints from before there were parts held one number beside tensors."""
    if "parts" in state:
        return int(state["iteration"]), {name: dict(values) for name, values in state["parts"].items()}
    scale = float(state.get("reference_scale", 1.0))
    return int(state["iteration"]), {"learner": {}, "rollout": {}, "optimizer": {}, "reference": {"scale": scale}}


def _files(path: Path) -> list[Path]:
    """What a checkpoint holds beside state.json, in the order of the checksum."""
    found = (each for each in path.rglob("*") if each.is_file() and each != path / _STATE)
    return sorted(found, key=lambda each: (each != path / TENSORS, each.relative_to(path).as_posix()))


def _digest(path: Path, state: dict[str, Any]) -> str:
    """Checksum of all files of a checkpoint."""
    digest = hashlib.sha256()
    for each in _files(path):
        if each != path / TENSORS:  # alone it has no name: such are older checkpoints
            digest.update(each.relative_to(path).as_posix().encode())
        with each.open("rb") as handle:
            while block := handle.read(2**20):
                digest.update(block)
    digest.update(json.dumps(state, sort_keys=True).encode())
    return digest.hexdigest()


def _flatten(parts: Mapping[str, Part]) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, Any]]]:
    """Tensors by the name of their part and their own, and the other values by part."""
    tensors: dict[str, torch.Tensor] = {}
    others: dict[str, dict[str, Any]] = {}
    for part, saved in parts.items():
        assert "." not in part, f"{part!r}: a dot ends the name of a part"
        state = saved.state_dict()
        tensors |= {f"{part}.{name}": value for name, value in state.items() if isinstance(value, torch.Tensor)}
        others[part] = {name: value for name, value in state.items() if not isinstance(value, torch.Tensor)}
    return tensors, others
