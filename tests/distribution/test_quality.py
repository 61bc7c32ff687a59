"""Precision, recall, Vendi score and mode coverage, by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import advflow_ext as af
from advflow_ext.distribution import quality
from tests.distribution import deletion

# On a line. With k = 1 each ball reaches to the nearest of its own set.
REAL = torch.tensor([[0.0], [1.0], [10.0], [12.0]])  # radii 1, 1, 2, 2: covers [-1, 2] and [8, 14]
GENERATED = torch.tensor(
    [[1.5], [2.0], [5.0], [14.0], [30.0]]
)  # radii .5, .5, 3, 9, 16: [1, 2.5], [2, 8], [5, 23], [14, 46]


def test_precision_and_recall_by_hand(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    for rows in (512, 2):  # a matrix at once, and in parts
        monkeypatch.setattr(quality, "_ROWS", rows)
        found = af.precision_recall(GENERATED.to(device), REAL.to(device), k=1)
        assert (float(found.precision), float(found.recall)) == (3 / 5, 3 / 4)  # 1.5, 2, 14; 1, 10, 12


def test_a_set_is_precise_and_complete_to_itself() -> None:
    rows = deletion.features(20, 4, 1, shift=100.0)
    rows[5:10] = rows[4]  # balls of radius 0
    assert [float(each) for each in af.precision_recall(rows, rows.clone())] == [1.0, 1.0]


def test_a_lost_mode_shows_in_recall_and_a_bad_one_in_precision() -> None:
    left, right = deletion.features(30, 4, 1), deletion.features(30, 4, 1) + 100
    real = torch.cat([left, right])
    lost = af.precision_recall(torch.cat([left, left + 1e-3]), real)
    bad = af.precision_recall(torch.cat([real, real - 1000]), real)
    assert (float(lost.precision), float(lost.recall)) == (1.0, 0.5)
    assert (float(bad.precision), float(bad.recall)) == (0.5, 1.0)


@pytest.mark.parametrize(
    ("rows", "worth"),
    [
        (torch.eye(4, 6), 4.0),
        (torch.eye(4), 4.0),
        (torch.tensor([[3.0, 0.0]] * 5), 1.0),
        (torch.tensor([[1.0, 0.0]] * 3 + [[0.0, 2.0]]), math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))),
    ],
)
def test_vendi_score_counts_different_images(rows: torch.Tensor, worth: float) -> None:
    assert float(af.vendi_score(rows)) == pytest.approx(worth, rel=1e-12)


def test_vendi_score_is_that_of_the_larger_matrix() -> None:
    rows = deletion.features(12, 5, 1)
    similar = torch.nn.functional.cosine_similarity(rows[:, None], rows[None], dim=-1)
    values = torch.linalg.eigvalsh(similar / 12).clamp(min=1e-300)
    assert float(af.vendi_score(rows)) == pytest.approx(float((-values * values.log()).sum().exp()), rel=1e-10)


def test_modes_by_hand() -> None:
    found = af.mode_coverage(torch.tensor([0, 0, 2, -1, 0]), 4)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert [float(each) for each in found] == pytest.approx([0.5, math.log(4) - entropy, 0.8])
    every = af.mode_coverage(torch.arange(6) % 3, 3)
    assert [float(each) for each in every] == pytest.approx([1.0, 0.0, 1.0], abs=1e-15)
    assert [float(each) for each in af.mode_coverage(torch.tensor([-1, -1]), 3)] == [0.0, math.log(3), 0.0]


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: af.precision_recall(REAL, REAL, k=4), r"k is 4 with 4 and 4 rows; accepted is a k below both"),
        (lambda: af.precision_recall(REAL, REAL, k=0), r"k is 0; accepted is an integer of at least 1"),
        (lambda: af.precision_recall(REAL / 0, REAL), r"generated has 4 rows that are not finite; accepted are finite"),
        (
            lambda: af.precision_recall(REAL, REAL.expand(4, 2)),
            r"generated is \[4, 1\] on cpu and real \[4, 2\] on cpu",
        ),
        (lambda: af.vendi_score(torch.zeros(2, 3)), r"features has 2 rows without a direction of 2; accepted is"),
        (lambda: af.vendi_score(torch.zeros(0, 3)), r"features has 0 rows without a direction of 0; accepted is"),
        (lambda: af.mode_coverage(torch.tensor([3]), 3), r"labels holds 3; accepted are numbers below modes, 3"),
        (lambda: af.mode_coverage(torch.tensor([0.0]), 3), r"labels is torch.float32; accepted is .* integers \[N\]"),
        (lambda: af.mode_coverage([0], 3), r"labels is list; accepted is a torch.Tensor of integers"),
        (lambda: af.mode_coverage(torch.zeros(0, dtype=torch.long), 3), r"labels has shape \[0\]; accepted is \[N\]"),
    ],
)
def test_misuse_is_said_in_a_sentence(call: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        call()
