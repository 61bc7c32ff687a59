"""A few transitions of the exactness run meet its limits, and the run would say if they did not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from advflow_ext import _native

pytest.importorskip("matplotlib", reason="bench.exactness draws with matplotlib")
from bench.exactness import __main__ as exactness
from bench.exactness.__main__ import LIMITS, METHODS, OURS, TARGETS, find

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(not _native.serves(torch.empty(1)), reason="without kernels ours is the reference")


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    return exactness.document(exactness.measure(samples=4), samples=4)


def test_ours_meets_the_limits(result: dict[str, Any]) -> None:
    assert exactness.missed_limits(result["results"]) == []
    for method in OURS:
        for target in TARGETS:
            row = find(result, method, target)
            assert row["wrong_signs"] == row["wrong_masks"] == 0
            assert row["log_ratio_error_max"] <= 2e-10 and row["kl_error_max"] <= 1e-5


def test_the_others_do_not(result: dict[str, Any]) -> None:
    for target in TARGETS:
        assert find(result, "log_probs", target)["log_ratio_error_max"] > 1e-8
        assert find(result, "bf16_means", target)["kl_error_median"] > 0.1
    assert find(result, "log_probs", 1e-9)["wrong_signs"] > 0
    assert find(result, "bf16_means", 1e-7)["wrong_masks"] > 0
    # Rounding the stored eps moves the log-ratio, but by little of its spread.
    assert 0 < find(result, "ours_bf16_eps", 1e-7)["moved_by_rounding_eps"] < 0.01


def test_thresholds_divide_the_transitions(result: dict[str, Any]) -> None:
    for row in result["results"]:
        assert row["transitions"] == 24 and 0.2 < row["above_threshold"] < 0.8
    assert len(result["results"]) == len(METHODS) * len(TARGETS)
    assert len(result["by_step"]) == 6 * len(result["results"])


@pytest.mark.parametrize("name", LIMITS)
@pytest.mark.parametrize("value", [1.0, float("nan")])
def test_a_missed_limit_is_named(result: dict[str, Any], name: str, value: float) -> None:
    worse = [row | {name: value} if row["method"] == "ours" else row for row in result["results"]]
    missed = exactness.missed_limits(worse)
    assert len(missed) == len(TARGETS) and all(name in sentence for sentence in missed)


def test_a_missed_limit_fails_the_run_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exactness, "LIMITS", {"kl_error_max": 0.0})
    assert exactness.main(["--samples", "1", "--out", str(tmp_path)]) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_run_writes_page_picture_and_numbers(tmp_path: Path) -> None:
    assert exactness.main(["--samples", "1", "--out", str(tmp_path)]) == 0
    numbers = json.loads((tmp_path / "bench/results/exactness-cpu.json").read_text())
    assert {"cpu", "commit", "torch"} <= numbers["environment"].keys()
    assert (tmp_path / "docs/exactness.md").read_text() == exactness.markdown(numbers)
    assert (tmp_path / "docs/images/exactness.png").stat().st_size > 10_000


def test_the_committed_page_is_that_of_the_committed_numbers() -> None:
    numbers = json.loads((ROOT / "bench/results/exactness-cpu.json").read_text())
    assert numbers["samples"] >= 256 and exactness.missed_limits(numbers["results"]) == []
    assert (ROOT / "docs/exactness.md").read_text() == exactness.markdown(numbers)
