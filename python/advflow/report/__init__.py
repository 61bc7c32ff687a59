"""Self-contained pages about a run, or about several, finished or not, that need no server and no network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from advflow.core.files import write_atomically
from advflow.report.comparison import titles_of
from advflow.report.data import load_run
from advflow.report.page import render, render_comparison

__all__ = ["write_comparison", "write_report"]


def write_report(folder: Path) -> Path:
    """Writes `folder`/report.html from what the run has left there so far, and returns its path.

    The same files give the same page, byte for byte. Raises FileNotFoundError where `folder` is no run, ValueError
    where its config.yaml cannot be read.
    """
    page = render(load_run(folder))
    path = folder / "report.html"
    write_atomically(path, page)  # a browser that reloads never sees half a page
    return path


def write_comparison(folders: Sequence[Path], out: Path) -> None:
    """Writes one page about the runs in `folders`, finished or not, into the file `out`.

    Raises FileNotFoundError where one is no run, ValueError where one's config.yaml cannot be read or one comes twice.
    """
    titles = titles_of(folders)
    runs = [replace(load_run(folder), name=title) for folder, title in zip(folders, titles, strict=True)]
    write_atomically(out, render_comparison(runs))
