"""The page of bars and the bar of progress."""

from __future__ import annotations

import io
import re

import pytest

from advflow_ext.bench.harness import chart, progress
from tests.bench.test_render import Row, document, row


def page(*rows: Row) -> str:
    given = document(*rows)
    for result in given["results"]:
        result["source"] = "DiffusionNFT"
    return chart.html(given)


def widths(text: str) -> list[float]:
    """Of the first case's bars, in pixels."""
    return [float(width) for width in re.findall(r'<rect[^>]* width="([^"]+)"', text.partition("</svg>")[0])]


def test_bars_are_as_long_as_times() -> None:
    text = page(row("ours", 1e-3), row("public", 4e-3), row("copy", 5e-4))
    assert widths(text) == pytest.approx([chart.BAR / 4, chart.BAR, chart.BAR / 8], abs=0.1)
    assert ">40 ms, 4 times ours<" in text and ">10 ms<" in text and ">5 ms, 0.5 times ours<" in text
    assert "public: NVlabs/DiffusionNFT @24af555" in text


def test_graphs_time_the_device_and_what_has_none_is_called() -> None:
    text = page(row("ours", 9e-3, graph=1e-3), row("public", 2e-3))
    assert widths(text) == pytest.approx([chart.BAR / 2, chart.BAR], abs=0.1)
    assert "in a CUDA graph" in text


def test_wrong_and_failed_rows_have_no_bar_and_say_so() -> None:
    failed = row("compile", 1.0) | {"error": "RuntimeError: a < b"}
    text = page(row("ours", 1e-3), row("public", 4e-3, green=False), failed, row("eager", 1e-3, steady=False))
    assert len(widths(text)) == 2
    assert "wrong result, not timed against ours" in text and "failed: RuntimeError: a &lt; b" in text
    assert "1 times ours, unsteady" in text


def test_the_page_needs_nothing_beside_itself() -> None:
    text = page(row("ours", 1e-3))
    assert not re.search(r"https?://|<script|<link|@import|url[(]|src=", text)
    assert "Left out for lack of time: what was missed." in text


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_what_is_left_goes_as_fast_as_what_was_done(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    bar = progress.Progress(4.0, io.StringIO())
    assert bar.line() == f"[{'.' * 24}]   0 %  0:00"
    now[0], _ = 130.0, bar.finished(1.0)
    assert bar.line() == f"[{'#' * 6}{'.' * 18}]  25 %  0:30, 1:30 left"
    bar.finished(3.0)
    assert bar.line() == f"[{'#' * 24}] 100 %  0:30, 0:00 left"
    assert [progress.clock(seconds) for seconds in (5, 750, 3723)] == ["0:05", "12:30", "1:02:03"]


def test_a_terminal_has_one_line_and_a_log_a_line_for_a_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for stream in (Terminal(), io.StringIO()):
        bar = progress.Progress(2.0, stream)
        for case in ("one", "two"):
            for part in ("first call", "timing" * 20):
                bar.doing(case, part)
        bar.clear()
        said = stream.getvalue()
        if stream.isatty():
            assert "\n" not in said and said.endswith("\r\033[K") and "one first call" in said
            assert max(map(len, said.replace("\033[K", "").split("\r"))) < 80
        else:
            assert [line.rsplit("  ", 1)[1] for line in said.splitlines()] == ["one", "two"]
