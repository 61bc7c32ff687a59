"""Moments of features: numpy's numbers, in parts or whole, on disk and back; their distance."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import advflow_ext as af
from tests.distribution import deletion

WORDS = {"extractor": "inception_v3 pool", "preprocessing": "299 px, antialias"}


def test_moments_are_those_of_the_rows(device: str) -> None:
    rows = deletion.features(9, 5, 1).to(device)
    moments = af.FeatureMoments.of(rows.float(), **WORDS)
    torch.testing.assert_close(moments.mean, rows.float().double().mean(0))
    torch.testing.assert_close(moments.covariance, torch.cov(rows.float().double().T, correction=0))
    assert (moments.count, moments.dropped, moments.extractor) == (9, 0, "inception_v3 pool")


def test_a_small_spread_far_from_zero_is_kept() -> None:
    """Raw sums of squares would leave about four digits of it."""
    rows = deletion.features(50, 4, 2)
    far = rows + 1e6
    torch.testing.assert_close(
        af.FeatureMoments.of(far).covariance, torch.cov((far - 1e6).T, correction=0), rtol=1e-9, atol=1e-12
    )


def test_parts_join_to_the_whole() -> None:
    rows = deletion.features(20, 5, 3, shift=2.0)
    rows[7, 1] = torch.inf
    rows[19] = torch.nan
    whole = af.FeatureMoments.of(rows, **WORDS)
    first, second, third = (af.FeatureMoments.of(part, **WORDS) for part in rows.split([1, 12, 7]))
    joined = first + second + third
    torch.testing.assert_close(joined.mean, whole.mean, rtol=1e-13, atol=0)
    torch.testing.assert_close(joined.covariance, whole.covariance, rtol=1e-12, atol=1e-14)
    assert (joined.count, joined.dropped) == (whole.count, whole.dropped) == (18, 2)
    assert (joined.extractor, joined.preprocessing) == tuple(WORDS.values())


def test_a_file_holds_all_of_it(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    moments = af.FeatureMoments.of(torch.cat([deletion.features(9, 5, 1), torch.full((1, 5), torch.nan)]), **WORDS)
    moments.save(tmp_path / "reference.safetensors")
    back = af.FeatureMoments.load(tmp_path / "reference.safetensors")
    assert torch.equal(back.mean, moments.mean) and torch.equal(back.covariance, moments.covariance)
    assert (back.count, back.dropped, back.extractor, back.preprocessing) == (9, 1, *WORDS.values())


def test_another_file_is_refused(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file({"mean": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other.safetensors holds None; accepted is what FeatureMoments.save wrote"):
        af.FeatureMoments.load(tmp_path / "other.safetensors")


def test_a_missing_safetensors_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"needs safetensors, which is not installed: pip install safetensors"):
        af.FeatureMoments.of(torch.ones(2, 2)).save(tmp_path / "reference.safetensors")


def test_frechet_distance_of_one_feature_is_that_of_two_normals() -> None:
    first, second = torch.tensor([[1.0], [3.0]]), torch.tensor([[0.0], [3.0], [6.0]])
    distance = af.frechet_distance(af.FeatureMoments.of(first), af.FeatureMoments.of(second))
    assert float(distance) == pytest.approx((2 - 3) ** 2 + (2**0.5 - 3) ** 2, rel=1e-14)


def test_frechet_distance_is_the_published_formula_both_ways() -> None:
    first, second = deletion.features(12, 5, 1, shift=1.0), deletion.features(30, 5, 2)
    ours = [
        af.frechet_distance(af.FeatureMoments.of(a), af.FeatureMoments.of(b))
        for a, b in ((first, second), (second, first))
    ]
    c_1, c_2 = torch.cov(first.T), torch.cov(second.T)
    product = torch.linalg.eigvals(c_1 @ c_2).real.sqrt().sum()
    true = (first.mean(0) - second.mean(0)).square().sum() + c_1.trace() + c_2.trace() - 2 * product
    torch.testing.assert_close(torch.stack(ours), true.expand(2), rtol=1e-10, atol=0)


def test_frechet_distance_to_itself_is_zero_with_fewer_images_than_features() -> None:
    moments = af.FeatureMoments.of(deletion.features(5, 20, 1))
    assert 0 <= float(af.frechet_distance(moments, moments)) < 1e-9 * float(moments.covariance.trace())


EYE, ZERO = torch.eye(2), torch.zeros(2)
SKEW = torch.tensor([[0.0, 0.5], [0.0, 0.0]])
TWO = af.FeatureMoments.of(torch.eye(2), **WORDS)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: af.FeatureMoments.of(torch.ones(3)), r"features has shape \[3\]; accepted is \[N, d\], one row an im"),
        (lambda: af.FeatureMoments.of(torch.ones(3, 0)), r"features has shape \[3, 0\]; accepted is \[N, d\]"),
        (
            lambda: af.FeatureMoments.of(torch.ones(0, 3)),
            r"features has 0 rows, none of them finite; accepted is at le",
        ),
        (lambda: af.FeatureMoments.of(torch.full((2, 3), torch.nan)), r"features has 2 rows, none of them finite"),
        (lambda: af.FeatureMoments.of([[1.0]]), r"features is a list; accepted is a floating-point torch.Tensor"),
        (lambda: af.FeatureMoments(ZERO, torch.ones(2, 3), 1), r"covariance has shape \[2, 3\]; accepted is \[d, d\]"),
        (lambda: af.FeatureMoments(torch.zeros(3), EYE, 1), r"mean has shape \[3\] on cpu; accepted is \[2\] on cpu"),
        (lambda: af.FeatureMoments(ZERO, EYE, 0), r"count is 0; accepted is an integer of at least 1"),
        (lambda: af.FeatureMoments(ZERO, EYE / 0, 1), r"covariance holds numbers that are not finite"),
        (
            lambda: af.FeatureMoments(ZERO, EYE + SKEW, 1),
            r"covariance differs from its transpose by 0.5; accepted is a s",
        ),
        (
            lambda: af.FeatureMoments(ZERO, EYE - 1.5 * EYE, 1),
            r"covariance has -0.5 on its diagonal; accepted are varia",
        ),
        (lambda: af.FeatureMoments(ZERO, EYE, 1, extractor=None), r"extractor is None; accepted is a string"),
        (
            lambda: TWO + af.FeatureMoments.of(torch.eye(2), extractor="clip", preprocessing=TWO.preprocessing),
            r"one extractor is 'inception_v3 pool' and the other 'clip'; accepted is one for both sets",
        ),
        (
            lambda: af.frechet_distance(TWO, af.FeatureMoments(ZERO, EYE, 2, TWO.extractor, "no antialias")),
            r"one preprocessing is '299 px, antialias' and the other 'no antialias'",
        ),
        (
            lambda: af.frechet_distance(TWO, af.FeatureMoments.of(torch.eye(3), **WORDS)),
            r"the sets have 2 features on cpu and 3 features on cpu; accepted is one number on one device",
        ),
        (
            lambda: af.frechet_distance(TWO, af.FeatureMoments.of(torch.ones(1, 2), **WORDS)),
            r"second has a count of 1; accepted is at least 2",
        ),
    ],
)
def test_misuse_is_said_in_a_sentence(call: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        call()
