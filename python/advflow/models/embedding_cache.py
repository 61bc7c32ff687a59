"""Embeddings of prompts on disk, for runs whose text encoders shall not stay in memory.

A folder for each set of text encoders holds safetensors files with the embeddings of up to 64 texts each. A text is
found by its checksum, and what is read is compared with another. A file is there when it is whole: who was killed goes
on after the last one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from advflow.core.files import written_aside
from advflow.core.progress import show_progress
from advflow.core.ranks import Ranks
from advflow.core.tensor_files import as_os_errors
from advflow.models.family import TEXTS_AT_A_TIME

_ROWS = "rows"  # in the metadata of a file, the checksums of each text and of its embeddings
_FORGOTTEN_AFTER = 86_400  # seconds after which a file that nobody finished is removed

Encode = Callable[[Sequence[str]], dict[str, torch.Tensor]]
"""Embeddings of at most TEXTS_AT_A_TIME texts: tensors with a row for each."""


class _Place(NamedTuple):
    path: Path
    row: int
    digest: str


class EmbeddingCache:
    """What is in `folder` for the text encoders of `identity`. Runs may share it at the same time."""

    def __init__(self, folder: Path, identity: str) -> None:
        self._folder = folder / identity[:32]
        self._places: dict[str, _Place] = {}
        self._opened: dict[Path, Any] = {}

    def fill(self, texts: Sequence[str], encode: Encode, field: str, ranks: Ranks) -> None:
        """Encodes what of `texts`, which `field` names, is not there yet; each of `ranks` its share.

        Raises ValueError where the disk has not the room, or the processes not one folder.
        """
        self._make_folder()
        self._look()
        different = list(dict.fromkeys(texts))
        own_view = [number for number, text in enumerate(different) if _key(text) not in self._places]
        # What is there may change while they look: all go by what the first has seen.
        missing = [different[number] for number in ranks.everyone(own_view if ranks.first else None)[0]]
        parts = [missing[start : start + TEXTS_AT_A_TIME] for start in range(0, len(missing), TEXTS_AT_A_TIME)]
        own = range(len(parts))[ranks.share(len(parts))]
        if ranks.first:
            there = len(different) - len(missing)
            print(f"{field}: {there:,} embeddings are in {self._folder}, {len(missing):,} are to be made")
        bar = show_progress(own, desc=field, unit=f"x{TEXTS_AT_A_TIME} prompts", silent=not (ranks.first and own))
        for number in bar:
            rows = encode(parts[number])
            if number == own.start:
                self._require_room(rows, len(parts))
            self._write(parts[number], rows)
        ranks.wait()
        self._look()
        self._require_all(different, ranks)

    def _require_all(self, texts: Sequence[str], ranks: Ranks) -> None:
        lost = ranks.everyone(sum(_key(text) not in self._places for text in texts))
        if not any(lost):
            return
        if ranks.size == 1:
            raise ValueError(
                f"{lost[0]:,} embeddings that were there are no longer in {self._folder}; accepted is a "
                "data.embeddings_cache from which nothing is removed while a run uses it"
            )
        seen = ", ".join(f"{count:,} as process {rank} sees it" for rank, count in enumerate(lost) if count)
        raise ValueError(
            f"embeddings that were made are not in {self._folder}: {seen}; data.embeddings_cache must be a folder that "
            "all processes see"
        )

    def read(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Tensors on the CPU with a row for each text. Raises ValueError where they are not what was written."""
        rows = [self._row(text) for text in texts]
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    def _row(self, text: str) -> dict[str, torch.Tensor]:
        path, row, digest = self._places[_key(text)]
        try:
            if path not in self._opened:
                self._opened[path] = safe_open(path, "pt")
            opened = self._opened[path]
            found = {name: opened.get_slice(name)[row : row + 1] for name in sorted(opened.keys())}
        except OSError as error:
            raise ValueError(_unreadable(path, error)) from error
        except SafetensorError as error:
            raise ValueError(f"{_damaged(path)} ({error})") from error
        if _digest(found) != digest:
            raise ValueError(f"{_damaged(path)} (the embeddings of {text!r:.60} are not those that were written)")
        return found

    def _make_folder(self) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"data.embeddings_cache: {self._folder} cannot be made: {error.strerror}") from error
        for path in self._folder.glob(".*.partial"):
            if time.time() - path.stat().st_mtime > _FORGOTTEN_AFTER:
                path.unlink(missing_ok=True)

    def _look(self) -> None:
        """Takes note of what is there. A file with something else in it is named, removed, and made again.

        Raises ValueError for one that cannot be read at all: it may be whole, and of use to other runs.
        """
        for path in sorted(self._folder.glob("*.safetensors")):
            if path in self._opened:
                continue
            try:
                opened = safe_open(path, "pt")
                rows = json.loads(opened.metadata()[_ROWS])
                self._places |= {key: _Place(path, row, digest) for row, (key, digest) in enumerate(rows)}
                self._opened[path] = opened
            except OSError as error:
                if os.path.lexists(path):  # and has not been removed by another run since
                    raise ValueError(_unreadable(path, error)) from error
            except (SafetensorError, ValueError, KeyError, TypeError) as error:
                warnings.warn(f"{path} is damaged ({error}); its prompts are encoded again", stacklevel=2)
                path.unlink(missing_ok=True)

    def _require_room(self, rows: Mapping[str, torch.Tensor], files: int) -> None:
        needed = files * sum(tensor.nbytes for tensor in rows.values())
        free = shutil.disk_usage(self._folder).free
        if needed > free:
            raise ValueError(
                f"{self._folder} has {free / 1e9:.1f} GB left, and the embeddings take about {needed / 1e9:.1f} GB; "
                "accepted is a data.embeddings_cache with more room"
            )

    def _write(self, texts: Sequence[str], rows: Mapping[str, torch.Tensor]) -> None:
        tensors = {name: tensor.cpu().contiguous() for name, tensor in rows.items()}
        keys = [_key(text) for text in texts]
        digests = [_digest({name: t[row : row + 1] for name, t in tensors.items()}) for row in range(len(texts))]
        path = self._folder / f"{hashlib.sha256(''.join(keys).encode()).hexdigest()[:32]}.safetensors"
        # Another run may be making the same file.
        own = path.with_name(f".{path.stem}.{os.getpid()}.partial")
        with as_os_errors(path), written_aside(path, own) as scratch:
            scratch.touch()
            mode = scratch.stat().st_mode
            save_file(tensors, scratch, {_ROWS: json.dumps(list(zip(keys, digests, strict=True)))})
            scratch.chmod(mode)  # safetensors leaves its files to their owner alone


def _key(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _unreadable(path: Path, error: OSError) -> str:
    reason: object = error
    try:  # safetensors says that there is no file where there are too many open ones
        path.open("rb").close()
    except OSError as own:
        reason = own.strerror
    return f"{path} cannot be read ({reason}); accepted is a data.embeddings_cache whose files this process can read"


def _damaged(path: Path) -> str:
    return f"{path} is damaged: remove it and go on with --resume, which encodes its prompts again"
