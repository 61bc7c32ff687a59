"""Tables and plots of a report: what is in them, and what is kept out of them."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest

from advflow_ext.bench.harness import render

Row = dict[str, Any]


def row(name: str, median: float, graph: float | None = None, green: bool = True, steady: bool = True) -> Row:
    def times(seconds: float) -> dict[str, Any]:
        return {"q20": seconds, "median": seconds, "q80": seconds, "samples": 3, "steady": steady}

    return {
        "implementation": name,
        "check": {"green": green},
        "peak_extra_bytes": 96,
        "times": times(median),
        "graph_times": None if graph is None else times(graph),
    }


def document(*rows: Row) -> dict[str, Any]:
    """Two sizes, the larger first; everything takes ten times as long at ten times the size."""

    def result(scale: int) -> dict[str, Any]:
        case = {"op": "op", "shape": [scale, 3], "dtype": "bf16", "with_ref": True, "name": f"op {scale}"}
        scaled = json.loads(json.dumps(rows))
        for each in scaled:
            for clock in ("times", "graph_times"):
                if each[clock]:
                    each[clock]["median"] *= scale
        return {"case": case, "implementations": scaled, "bytes_moved": 1000 * scale, "gradient_bytes": 64}

    environment = {
        "date": "2026-01-01", "commit": "abc", "cpu": "a cpu", "threads": 2, "gpu": None,
        "python": "3.12", "torch": "2.11", "cuda": None, "triton": "3.6",
    }  # fmt: skip
    return {
        "environment": environment,
        "copy_bytes_per_second": 1e6,
        "rounds": 3,
        "left_out": ["what was missed"],
        "results": [result(10), result(1)],
    }


def lines_of(given: dict[str, Any]) -> dict[str, list[render.Point]]:
    (results,) = render.groups(given).values()
    return render.series(given, results, "bf16")


def test_points_rise_with_the_bytes_and_share_is_of_the_copy_beside() -> None:
    lines = lines_of(document(row("ours", 4e-6), row("eager", 8e-6), row("copy", 2e-6)))
    assert lines["ours"] == [(1000, pytest.approx(4e-6), pytest.approx(0.5)), (10_000, pytest.approx(4e-5), 0.5)]
    assert [point.share_of_copy for point in lines["eager"]] == pytest.approx([0.25, 0.25])
    assert [point.share_of_copy for point in lines["copy"]] == [1.0, 1.0]


def test_a_report_without_a_copy_takes_the_large_one() -> None:
    assert lines_of(document(row("ours", 2e-3)))["ours"][0].share_of_copy == pytest.approx(0.5)


def test_the_device_alone_where_it_was_timed_and_the_call_where_it_could_not_be() -> None:
    lines = lines_of(document(row("ours", 9e-6, 4e-6), row("public", 8e-6), row("copy", 9e-6, 2e-6)))
    assert lines["ours"][0].seconds == 4e-6 and lines["ours"][0].share_of_copy == pytest.approx(0.5)
    assert lines["public"][0].seconds == 8e-6


def test_wrong_results_are_drawn_nowhere_and_named_in_the_table() -> None:
    given = document(row("ours", 4e-6), row("eager", 8e-6, green=False), row("copy", 2e-6))
    assert "eager" not in lines_of(given)
    text = render.markdown(given)
    assert "| wrong |" in text and "(2.00x)" not in text


def test_the_table_says_time_ratio_share_memory_and_what_was_left_out() -> None:
    given = document(row("ours", 9e-6, 4e-6), row("eager", 8e-6, 8e-6, steady=False), row("copy", 2e-6, 2e-6))
    text = render.markdown(given)
    assert (
        "| 1x3 bf16 | 0.001 MB | 4 us / 9 us | 8 us (2.00x) / 8 us (0.89x) ? | 2 us (0.50x) / 2 us (0.22x) | " in text
    )
    assert "| 50 % | 1.50 |" in text and "Left out for lack of time: what was missed." in text
    assert "## op, with v_ref" in text and "commit abc" in text


@pytest.mark.parametrize(("seconds", "text"), [(1.2345, "1.23e+03 ms"), (0.0123, "12.3 ms"), (4.56e-6, "4.56 us")])
def test_durations(seconds: float, text: str) -> None:
    assert render.duration(seconds) == text


def test_plots_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "in.json").write_text(json.dumps(document(row("ours", 4e-6), row("copy", 2e-6))))
    assert render.main([str(tmp_path / "in.json"), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out/op-with-v_ref.png").stat().st_size > 10_000
    assert (tmp_path / "out/table.md").read_text() == render.markdown(document(row("ours", 4e-6), row("copy", 2e-6)))


def test_without_matplotlib_there_is_a_table_and_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **options: Any) -> Any:
        if name.partition(".")[0] == "matplotlib":
            raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    (tmp_path / "in.json").write_text(json.dumps(document(row("ours", 4e-6))))
    assert render.main([str(tmp_path / "in.json"), "--out", str(tmp_path)]) == 0
    assert (tmp_path / "table.md").exists() and not list(tmp_path.glob("*.png"))
    assert "matplotlib is not installed here, so there are no plots" in capsys.readouterr().out
