"""The bench's own arithmetic, and one tiny run of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import memory, report, timing
from bench.__main__ import main
from bench.registry import OPS, Case, Check, cases, gradient_limit, parse_shapes

CASE = Case("advantage_flow_loss", (2, 4, 8, 8), "fp32", with_ref=True)


def test_quantiles_interpolate() -> None:
    times = timing.summarise([5.0, 1.0, 2.0, 4.0, 3.0, 6.0])
    assert (times.q20, times.median, times.q80, times.samples) == (2.0, 3.5, 5.0, 6)
    assert timing.summarise([7.0]).q80 == 7.0


def test_steady_means_a_narrow_spread() -> None:
    assert timing.Times(1.0, 1.2, 1.5, 9).to_json()["steady"]
    assert not timing.Times(1.0, 1.2, 1.6, 9).to_json()["steady"]


def test_rotation_outruns_the_cache_within_limits() -> None:
    assert timing.input_sets(bytes_per_set=10, cache_bytes=100) * 10 > 2 * 100
    assert timing.input_sets(bytes_per_set=10**9, cache_bytes=1) == 2
    assert timing.input_sets(bytes_per_set=1, cache_bytes=10**9) == 48


def test_every_implementation_goes_first_in_turn() -> None:
    order: list[str] = []
    calls = {name: [lambda name=name: order.append(name)] for name in "abc"}
    timing.round_robin(calls, torch.device("cpu"), rounds=3, warmup=0)
    assert "".join(order) == "abcbcacab"


def test_per_call_divides_all_but_the_count() -> None:
    assert timing.per_call(timing.Times(2.0, 4.0, 6.0, 5), 2) == timing.Times(1.0, 2.0, 3.0, 5)


def test_shapes_are_parsed_or_named_in_the_error() -> None:
    assert parse_shapes("8x16x64x64, 8x1024x64") == [(8, 16, 64, 64), (8, 1024, 64)]
    for bad in ["8", "8x", "axb", "0x4", "8x-1"]:
        with pytest.raises(ValueError, match=bad):
            parse_shapes(bad)


def test_cases_are_all_combinations() -> None:
    found = list(cases(["advantage_flow_loss"], None, ["fp32", "bf16"], [False, True]))
    assert len(found) == len(set(found)) == 12


@pytest.mark.parametrize(("with_ref", "tensors"), [(False, 2 * 4 + 1), (True, 2 * 5 + 1)])
@pytest.mark.parametrize(("dtype", "size"), [("fp32", 4), ("bf16", 2)])
def test_byte_count(with_ref: bool, tensors: int, dtype: str, size: int) -> None:
    case = Case("advantage_flow_loss", (2, 4, 8, 8), dtype, with_ref)
    assert OPS[case.op].bytes_moved(case) == tensors * 512 * size


def test_peak_is_the_highest_running_total() -> None:
    assert memory.peak_of([4, 8, -8, 4, -4, -4]) == 12
    assert memory.peak_of([-4, 4]) == 0


def test_peak_memory_of_known_work() -> None:
    x = torch.zeros(2**20)
    one = x.nbytes
    for work, peak in [(lambda: x + x, 1), (lambda: (x + x) * x, 2), (lambda: (x + x).mul_(x), 1)]:
        assert memory.peak_extra_bytes(work, torch.device("cpu")) == pytest.approx(peak * one, rel=0.01)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_check_is_green_for_the_right_answer_and_red_for_wrong_ones(dtype: str) -> None:
    op, device = OPS[CASE.op], torch.device("cpu")
    case = Case(CASE.op, CASE.shape, dtype, with_ref=True)
    arguments = op.arguments(case, device, seed=0)
    loss, grad = op.implementations()["eager"](arguments)
    assert op.check(case, arguments, (loss, grad)).green
    for wrong in [(loss * 1.001, grad), (loss, grad * 1.01), (loss * torch.nan, grad), (loss, grad * torch.nan)]:
        assert not op.check(case, arguments, wrong).green


def test_half_precision_limits_allow_one_rounding() -> None:
    assert gradient_limit(torch.bfloat16) == pytest.approx(2.0**-8, rel=1e-3)
    assert gradient_limit(torch.float32) == 1e-6


def row(name: str, median: float, green: bool = True) -> dict[str, Any]:
    check = Check(0.0, 0.0 if green else 1.0, 1e-6)
    times = timing.Times(median, median, median, 3).to_json()
    return {
        "implementation": name,
        "check": {"loss_error": 0.0, "grad_error": check.grad_error, "limit": 1e-6, "green": check.green},
        "times": times,
        "graph_times": None,
        "peak_extra_bytes": 64,
    }


def test_a_speed_up_needs_two_correct_results() -> None:
    assert report.speedup([row("ours", 1.0), row("eager", 3.0)], "eager") == 3.0
    assert report.speedup([row("ours", 1.0), row("eager", 3.0, green=False)], "eager") is None
    assert report.speedup([row("ours", 1.0, green=False), row("eager", 3.0)], "eager") is None
    assert report.speedup([row("eager", 3.0)], "eager") is None


def test_the_table_hides_speed_beside_a_red_result() -> None:
    red = report.table("case", [row("ours", 1.0), row("eager", 3.0, green=False)], 10**9, 64, 1e10)
    assert "3.00x" not in red and "gradient error 1.00e+00" in red
    assert "3.00x" in report.table("case", [row("ours", 1.0), row("eager", 3.0)], 10**9, 64, 1e10)


def test_a_failed_baseline_is_shown_not_fatal() -> None:
    failed = {"implementation": "compile", "check": {"green": False}, "error": "RuntimeError: no compiler"}
    text = report.table("case", [row("ours", 1.0), failed], 10**9, 64, 1e10)
    assert "compile        failed: RuntimeError: no compiler" in text


def test_a_whole_run_writes_a_complete_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "copy_bandwidth", lambda device: 1e10)
    out = tmp_path / "run.json"
    status = main(f"--device cpu --shapes 2x4x8x8 --rounds 2 --ref without --only ours,eager --json {out}".split())
    assert status == 0
    document = json.loads(out.read_text())
    assert {"date", "commit", "cpu", "cores", "torch", "native"} <= document["environment"].keys()
    assert [result["case"]["dtype"] for result in document["results"]] == ["fp32", "bf16"]
    for result in document["results"]:
        assert {each["implementation"] for each in result["implementations"]} == {"ours", "eager"}
        assert all(each["check"]["green"] and each["times"]["samples"] == 2 for each in result["implementations"])


@pytest.mark.parametrize("bad", ["--only oars", "--ops nothing", "--dtypes fp8", "--shapes 8"])
def test_unknown_names_are_refused(bad: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(bad.split())
    assert bad.split()[1] in capsys.readouterr().err
