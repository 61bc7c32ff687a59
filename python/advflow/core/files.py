"""Folders that can be written to, and files that are whole whatever a kill or a full disk interrupts."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What a write fails with where a disk, a quota or the size of a file is exhausted."""


def require_folder(out: str, field: str = "out") -> None:
    """Raises ValueError where `out`, the value of `field`, neither is a folder to write to nor can become one."""
    if not out:
        raise ValueError(f"{field} is empty; accepted is a folder, existing or not")
    folder = Path(out)
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        what = "a file" if nearest == folder else f"below {str(nearest)!r}, a file"
        raise ValueError(f"{field} is {out!r}, which is {what}; accepted is a folder, existing or not")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(f"{field} is {out!r}, and {str(nearest)!r} cannot be written to")


@contextmanager
def written_aside(path: Path, scratch: Path | None = None) -> Iterator[Path]:
    """Where to write what becomes the file `path` when the block has ended. Where that fails, nothing is left of it."""
    scratch = scratch or path.with_name(f".{path.name}.partial")
    try:
        yield scratch
        flush_to_disk(scratch)
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
    flush_to_disk(path.parent)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """An empty folder that becomes `folder`, which is not there, when the block has ended. Where that fails, nothing is
    left of it."""
    scratch = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        scratch.mkdir()
        yield scratch
        os.replace(scratch, folder)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replaces the file `path`, so that whatever happens either the old content or the new one is there."""
    with written_aside(path) as scratch:
        handle = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            _write(handle, content if isinstance(content, bytes) else content.encode(), scratch)
        finally:
            os.close(handle)


def append_line(path: Path, line: str) -> None:
    """Adds a line to the file `path`, the whole of it or none. What a kill has left of another line is cut off."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        end = _end_of_lines(handle)
        os.ftruncate(handle, end)
        try:
            _write(handle, f"{line}\n".encode(), path)
        except OSError:
            os.ftruncate(handle, end)
            raise
        os.fsync(handle)
    finally:
        os.close(handle)


def flush_to_disk(path: Path) -> None:
    """Returns when a file's content, or what a folder holds, would outlive a loss of power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write(handle: int, content: bytes, path: Path) -> None:
    """Writes all of it, or raises OSError that names `path`."""
    left = memoryview(content)
    try:
        while left:
            left = left[os.write(handle, left) :]
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _end_of_lines(handle: int) -> int:
    """The length of a file up to the end of its last whole line."""
    end = os.fstat(handle).st_size
    if end == 0 or os.pread(handle, 1, end - 1) == b"\n":
        return end
    return os.pread(handle, end, 0).rfind(b"\n") + 1
