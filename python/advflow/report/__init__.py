"""report.html: one self-contained page about a run, finished or not, that needs no server and no network."""

from __future__ import annotations

from pathlib import Path

from advflow.core.files import write_atomically
from advflow.report.data import load_run
from advflow.report.page import render

__all__ = ["write_report"]


def write_report(folder: Path) -> Path:
    """Writes `folder`/report.html from what the run has left there so far, and returns its path.

    The same files give the same page, byte for byte. Raises FileNotFoundError where `folder` is no run, ValueError
    where its config.yaml cannot be read.
    """
    page = render(load_run(folder))
    path = folder / "report.html"
    write_atomically(path, page)  # a browser that reloads never sees half a page
    return path
