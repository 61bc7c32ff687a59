"""The table of trainers: it holds, it would notice if it did not, and docs/conventions.md says the same."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch

from advflow_ext import conformance
from advflow_ext.conformance import rollout
from advflow_ext.conformance.__main__ import main
from advflow_ext.conformance.grpo_guard import guard_of_means
from advflow_ext.conformance.rows import SOURCES, TRANSITIONS, Inputs, Row

CONVENTIONS = Path(__file__).resolve().parents[2] / "docs" / "conventions.md"


@pytest.fixture(scope="module")
def compared() -> list[Row]:
    return conformance.rows()


def row(ours, theirs, departs=""):
    as_tensors = (torch.tensor([float(value)], dtype=torch.float64) for value in (ours, theirs))
    return Row("trainer", "quantity", "call", *((tensor,) for tensor in as_tensors), departs)


def test_every_row_agrees_or_says_why_not(compared):
    assert [each for each in compared if each.agrees is bool(each.departs)] == []


def test_no_row_is_there_twice(compared):
    assert len({(each.trainer, each.quantity, each.call) for each in compared}) == len(compared)


def test_clips_and_masks_have_something_to_decide(compared):
    counts = [float(each.ours[0]) for each in compared if each.quantity.startswith(("clipped", "masked"))]
    assert len(counts) >= 6 and all(0 < count < TRANSITIONS for count in counts)


def test_every_trainer_of_the_page_is_compared(compared):
    assert {each.trainer for each in compared} >= {
        "flow_grpo", "FlowCPS", "DanceGRPO", "MixGRPO", "GRPO-Guard (flow_grpo)", "GRPO-Guard (Flow-Factory)",
        "UniRL Flow-DPPO", "verl-omni", "DiffusionNFT", "AWM", "FlowAWR", "ORW-CFM", "AdvantageFlow",
    }  # fmt: skip
    assert {each.trainer for each in compared} == set(SOURCES)


def test_every_row_carries_its_commit(compared, capsys):
    dated = re.compile(r"[\w.-]+/[\w.-]+ @[0-9a-f]{7}|arXiv \d{4}\.\d{5}")
    assert [each for each in compared if not dated.fullmatch(each.commit)] == []
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert all(f"\n  {source}\n" in printed for source in SOURCES.values())


# What a schedule alone decides, and counts, may be the same for other inputs.
FIXED = ("sigma at s = 1", "KL of <dv^2> = 1", "clipped", "masked")


@pytest.mark.parametrize("seed", [1, 2])
def test_rows_are_computed(compared, seed):
    """With other inputs every number is another one and every verdict the same."""
    others = conformance.rows(seed)
    assert [(each.trainer, each.quantity, each.call, each.agrees) for each in others] == [
        (each.trainer, each.quantity, each.call, each.agrees) for each in compared
    ]
    for each, other in zip(compared, others, strict=True):
        if not each.quantity.startswith(FIXED):
            assert not torch.equal(each.ours[0], other.ours[0]) and not torch.equal(each.theirs[0], other.theirs[0])


def test_guard_of_flow_grpo_averages_its_drift_over_the_batch():
    """Its line takes the mean over ``range(1, 1)``, no dimension, which PyTorch reads as all of them."""
    assert torch.arange(6.0).view(2, 3).mean(dim=()) == 2.5
    inputs = Inputs()
    at = rollout.Rollout("", inputs, "flow_sde", 0.7, rollout.shifted_twice(10), torch.full((TRANSITIONS,), 3))
    sigma = (at.std / at.h.sqrt()).mean() * at.h.sqrt().mean()
    mu, mu_old = at.step(inputs.v)[0], at.step(inputs.v_old)[0]
    bias = (mu - mu_old).pow(2).mean(dim=()) / (2 * sigma**2)
    ratio = ((at.log_ratio(inputs.v) + bias) * sigma).exp()
    worse = torch.maximum(-inputs.A * ratio, -inputs.A * ratio.clamp(1 - 2e-6, 1 + 2e-6))
    expected = worse.mean() / at.h.sqrt().mean() ** 2
    torch.testing.assert_close(guard_of_means(at, True, inputs.v), expected, rtol=1e-14, atol=0)


def test_the_page_has_the_rows_of_the_table(compared):
    written, trainer = [], ""
    for line in CONVENTIONS.read_text().splitlines():
        if line.startswith("#"):
            trainer = line.lstrip("# ") if line.startswith("### ") else ""
        elif trainer and line.startswith("| ") and line != "| quantity | call | agrees |":
            written.append((trainer, *line.strip("| ").split(" | ")))
    computed = [
        (each.trainer, each.quantity, f"`{each.call}`", f"no: {each.departs}" if each.departs else "yes")
        for each in compared
    ]
    assert written == computed


def test_the_page_dates_every_trainer(compared):
    sections = {part.partition("\n")[0]: part for part in CONVENTIONS.read_text().split("\n### ")[1:]}
    undated = [name for name, source in SOURCES.items() if source not in " ".join(sections[name].split())]
    assert undated == []


def test_digits_count_what_agrees():
    assert row(1.0, 1.0).digits == 16
    assert row(1 + 1e-6, 1.0).digits == pytest.approx(6, abs=1e-3)
    assert row(-3.0, -3.0003).digits == pytest.approx(4, abs=1e-3)
    worst = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.02])
    assert Row("", "", "", *((tensor.double(),) for tensor in worst)).digits == pytest.approx(2, abs=0.01)


@pytest.mark.parametrize("pair", [(float("nan"), 1.0), (float("inf"), 1.0), (1.0, 0.0), (0.0, 0.0)])
def test_a_row_that_compares_nothing_does_not_agree(pair):
    assert not row(*pair).agrees


def test_a_wrong_row_fails_the_run_and_is_written(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(conformance, "TRAINERS", (lambda inputs: [row(1, 1), row(1, 2, "it halves"), row(1, 1.001)],))
    assert main(["--json", str(tmp_path / "table.json")]) == 1
    text = capsys.readouterr().out
    assert "1 of 3 rows agree" in text and "1 show where a trainer departs, 1 are wrong" in text
    assert "no: it halves" in text and "3.0  NO" in text
    written = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert [each["agrees"] for each in written] == [True, False, False]


def test_a_departure_alone_does_not_fail_the_run(monkeypatch, capsys):
    monkeypatch.setattr(conformance, "TRAINERS", (lambda inputs: [row(1, 1), row(1, 2, "it halves")],))
    assert main([]) == 0


@pytest.mark.parametrize(
    ("module", "formula", "wrong"),
    [
        ("rollout", "log_prob", lambda x_next, gaussian: rollout.log_prob_without_variance(x_next, gaussian)),
        (
            "dance_grpo",
            "clipped",
            lambda ratio, A, clip: torch.minimum(-A * ratio, -A * ratio.clamp(1 - clip, 1 + clip)).mean(),
        ),
    ],
)
def test_a_wrong_formula_is_noticed(monkeypatch, module, formula, wrong):
    # A trainer's function has the name of its module, and hides it.
    monkeypatch.setattr(sys.modules[f"advflow_ext.conformance.{module}"], formula, wrong)
    assert not all(each.agrees for each in conformance.dance_grpo(Inputs()))
