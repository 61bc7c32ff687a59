"""Folders that can be written to, and files that are whole."""

from __future__ import annotations

import os
from pathlib import Path


def require_folder(out: str) -> None:
    """Raises ValueError where `out` neither is a folder that can be written to nor can become one."""
    if not out:
        raise ValueError("out is empty; accepted is a folder, existing or not")
    folder = Path(out)
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        what = "a file" if nearest == folder else f"below {str(nearest)!r}, a file"
        raise ValueError(f"out is {out!r}, which is {what}; accepted is a folder, existing or not")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(f"out is {out!r}, and {str(nearest)!r} cannot be written to")


def write_atomically(path: Path, text: str) -> None:
    """Replaces the file `path`, so that whatever happens either the old text or the new one is there."""
    scratch = path.with_name(f".{path.name}.partial")
    with scratch.open("w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(scratch, path)
