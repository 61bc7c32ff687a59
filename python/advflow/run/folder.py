"""The folder of a run: who may write there, its config.yaml, and what a run that goes on may change of it."""

from __future__ import annotations

import fcntl
import os
import socket
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from advflow.core.files import require_folder, write_atomically
from advflow.settings.config import TrainConfig
from advflow.settings.numbers import in_yaml
from advflow.settings.rewards import read_rewards, scored_alike
from advflow.settings.yaml_files import CONFIG

MAY_CHANGE = (
    "iterations",
    "out",
    "device",
    "checkpoint_every",
    "checkpoints_kept",
    "checkpoints_kept_every",
    "data.embeddings_cache",
    "evaluation.every",
    "runtime.shard",
    "runtime.cuda_graphs",
    "tracking.to",
    "tracking.project",
    "tracking.args",
)
"""Settings that `--resume` may change: how long, where, in how much memory, how often and who is told.

And where the servers of a remote reward are, how often and how long they are asked.
"""
_REWARDS = {"data.reward": "reward", "data.reward_args": "reward_args"}
_LOCK = ".lock"


def check_folder(config: TrainConfig, resume: bool) -> None:
    """Refuses a folder that cannot be written to, or that holds a run which `config` would not continue.

    Raises ValueError.
    """
    require_folder(config.out)
    if not (Path(config.out) / CONFIG).exists():
        return
    if not resume:
        raise ValueError(f"out is {config.out!r}, where a run already is; give --resume or another --out")
    _refuse_changes(config)


def make_folder(config: TrainConfig) -> None:
    """Makes the folder of a new run. Raises ValueError where that cannot be done."""
    try:
        Path(config.out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"out is {config.out!r}, a folder that cannot be made: {error.strerror}") from error


def changed_settings(config: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """By dotted name, what the run in `config.out` has and what `config` has, where they differ."""
    pairs = {name: (old, new) for name, old, new in _pairs(_read(Path(config.out) / CONFIG), config, type(config)())}
    # A weight of 1 may be left out, and one reward may stand alone or in a mapping: what they mean counts.
    if read_rewards(pairs["data.reward"][0], pairs["data.reward_args"][0]) == config.data.rewards:
        del pairs["data.reward"], pairs["data.reward_args"]
    return {name: (old, new) for name, (old, new) in pairs.items() if old != new}


def write_config(config: TrainConfig) -> None:
    """Writes config.yaml where there is none or another one."""
    path = Path(config.out) / CONFIG
    if not path.exists() or changed_settings(config):
        write_atomically(path, yaml.safe_dump(asdict(config), sort_keys=False))


class FolderLock:
    """Keeps other training processes out of a folder, until its `with` block ends or the process is killed."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / _LOCK
        self._handle: int | None = None

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *_: object) -> None:
        if self._handle is not None:
            self._path.unlink(missing_ok=True)
            os.close(self._handle)

    def take(self) -> None:
        """Locks the folder, which must exist. Raises ValueError, naming the other process, where one has it."""
        while self._handle is None:
            handle = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.read(handle, 200).decode(errors="replace").strip() or "another process"
                os.close(handle)
                raise ValueError(
                    f"out is {str(self._path.parent)!r}, where {holder} is training; accepted is one at a time"
                ) from None
            except OSError as error:
                warnings.warn(f"{self._path} cannot be locked ({error}): no other process may train here", stacklevel=2)
            # It may have been removed between opening and locking, and a lock on what nobody finds keeps nobody out.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), os.stat(self._path)):
                    self._handle = handle
                    os.ftruncate(handle, 0)
                    os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
                    return
            os.close(handle)


def _refuse_changes(config: TrainConfig) -> None:
    changed = changed_settings(config)
    reward, arguments = (changed.get(name, [getattr(config.data, field)])[0] for name, field in _REWARDS.items())
    same_rewards = scored_alike(read_rewards(reward, arguments), config.data.rewards)
    accepted = (*MAY_CHANGE, *(_REWARDS if same_rewards else ()))
    differing = {name: pair for name, pair in changed.items() if name not in accepted}
    if differing:
        named = ", ".join(f"{name} is {new!r} and was {old!r}" for name, (old, new) in differing.items())
        raise ValueError(
            f"the run in {config.out!r} was started with other settings: {named}; --resume may change "
            f"{', '.join(MAY_CHANGE)}, so leave the rest out or give another --out"
        )


class _NoSetting:
    """What stands for the value of a setting that there is not, which None would be a value of."""

    def __repr__(self) -> str:
        return "no setting"


def _pairs(stored: Mapping[str, Any], config: Any, default: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, value in a file, value in `config`) of every setting of either; a mapping that is one is whole."""
    names = [each.name for each in fields(config)]
    for name in names:
        new, otherwise = getattr(config, name), getattr(default, name)
        old = stored.get(name, otherwise)
        if not is_dataclass(new):
            yield f"{prefix}{name}", in_yaml(old), in_yaml(new)
        elif old is None or old is otherwise or isinstance(old, Mapping):
            yield from _pairs(old if isinstance(old, Mapping) else {}, new, otherwise, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", old, new
    yield from ((f"{prefix}{name}", old, _NoSetting()) for name, old in stored.items() if name not in names)


def _read(path: Path) -> dict[str, Any]:
    try:
        stored = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(stored, dict):
        raise ValueError(f"{path} is not the config of a run: it holds no settings")
    return stored
