"""The bench of the policy loss of tokens compares one loss with itself, and the page says what its file does."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import advflow_ext as af
from advflow_ext.testing import relative_error
from bench.exactness.token_policy import TERMS, Case, in_turn, together

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/token-policy-loss.md").read_text()


@pytest.mark.parametrize("terms", TERMS)
def test_every_way_leads_to_one_loss(terms: str) -> None:
    case = Case((3, 5, 8), 16, terms, torch.device("cpu"), torch.float32)
    truth = case.truth()
    rows = [slice(b, b + 1) for b in range(3)]
    ways = (
        together(case.loss, case.leaves()),
        together(case.naive, case.leaves()),
        in_turn(case.naive, case.leaves(), rows),
    )
    for found in ways:
        assert all(relative_error(ours, right) < 1e-5 for ours, right in zip(found, truth, strict=True))
    assert len(case.advantages) == (2 if terms == "all" else 1)
    assert [name for name, _ in case.steps()][:2] == ["ours", "all logits"]


@pytest.mark.parametrize(
    ("mark", "file"), [("measured", "token-policy-cpu.json"), ("measured-gpu", "nvidia-h200/token-policy.json")]
)
def test_the_numbers_of_the_page_are_those_of_the_file(mark: str, file: str) -> None:
    rows = json.loads((ROOT / "bench/results" / file).read_text())["results"]
    table = PAGE.partition(f"<!-- {mark} -->")[2].partition(f"<!-- /{mark} -->")[0].strip()
    of_gpu = "gpu" in mark
    unit = 1e3 if of_gpu else 1.0
    assert [line.strip("| ").split(" | ") for line in table.split("\n")[2:]] == [
        [
            *([row["dtype"]] if of_gpu else []),
            row["terms"],
            row["implementation"],
            f"{row['peak_bytes'] / 1e6:,.0f}",
            f"{unit * row['seconds']:.1f}",
            *(f"{row[f'error_of_{name}']:.0e}".replace("e-0", "e-") for name in ("loss", "hidden", "weight")),
        ]
        for row in rows
    ]


def test_the_memory_and_errors_that_are_claimed_were_measured() -> None:
    rows = json.loads((ROOT / "bench/results/token-policy-cpu.json").read_text())["results"]
    by_name = {(row["terms"], row["implementation"]): row for row in rows}
    ours, naive = by_name["all", "ours"], by_name["all", "all logits"]
    assert (ours["sequences"], ours["tokens"], ours["vocabulary"]) == (16, 256, 16384)
    assert 8 * ours["peak_bytes"] <= naive["peak_bytes"]
    assert max(ours[f"error_of_{name}"] for name in ("loss", "hidden", "weight")) <= 1e-6


def test_what_is_said_of_a_gpu_was_measured() -> None:
    rows = json.loads((ROOT / "bench/results/nvidia-h200/token-policy.json").read_text())["results"]
    found = {(row["dtype"], row["terms"], row["implementation"]): row for row in rows}

    def ratios(number: str, of: str, terms: str) -> list[float]:
        dtypes = ("bfloat16", "float32")
        return sorted(found[d, terms, of][number] / found[d, terms, "ours"][number] for d in dtypes)

    assert ratios("peak_bytes", "all logits", "all")[0] > 9.5
    assert [round(each) for each in ratios("peak_bytes", "all logits", "policy")] == [5, 7]
    assert [round(1 / each, 1) for each in ratios("seconds", "all logits", "all")] == [2.4, 1.7]
    slower = [ratios("seconds", "all logits, compiled", terms) for terms in TERMS]
    assert min(min(slower)) > 1 / 9.5 and max(max(slower)) < 1 / 1.8
    assert [round(each, 1) for each in ratios("seconds", "Liger", "policy")] == [4.7, 6.9]


def test_the_code_of_the_page_runs() -> None:
    names: dict[str, Any] = {}
    exec(re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)[0], names)
    assert names["head"].weight.grad.any() and names["body"].weight.grad.any()
    metrics = names["out"].metrics.as_dict()
    assert metrics["ratio_min"] == metrics["ratio_max"] == 1 and metrics["nonfinite_samples"] == 0
    assert torch.equal(
        names["old"], af.token_log_prob(names["body"](names["states"]), names["head"].weight, names["tokens"])
    )
