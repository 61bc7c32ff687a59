"""What a run was made with: versions of packages, and the commit of this source tree."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

from advflow.core.files import append_line

STARTS = "starts.jsonl"


def versions() -> dict[str, str]:
    """Installed versions by package; "unknown" for a package that runs without being installed."""
    names = ("advflow", "advflow-ext", "torch", "diffusers", "transformers", "peft")
    return {name: version(name) for name in names} | {"python": platform.python_version()}


def version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "unknown"


def commit(file: str = __file__) -> str | None:
    """The commit of the source tree that `file` belongs to; None where it is tracked in none, as when installed.

    What ADVFLOW_COMMIT says goes first: in a copy of a tree git knows nothing, or another commit.
    """
    if named := os.environ.get("ADVFLOW_COMMIT"):
        return named
    path = Path(file).resolve()
    try:
        _git(path.parent, "ls-files", "--error-unmatch", path.name)
        return _git(path.parent, "describe", "--always", "--dirty", "--abbrev=12")
    except (OSError, subprocess.CalledProcessError):
        return None


def record_start(folder: Path, iteration: int) -> None:
    """Adds to a run's starts.jsonl what it begins with, or goes on with, whether or not it will come to an end."""
    row = {
        "iteration": iteration,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "commit": commit(),
    }
    append_line(folder / STARTS, json.dumps(row))


def _git(folder: Path, *words: str) -> str:
    return subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=True).stdout.strip()
