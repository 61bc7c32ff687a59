"""Leave-one-out FID: deletion's numbers, contained damage, one state over ranks, and none of the released traps."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import advflow_ext as af
from tests.distribution import deletion

BOTH = pytest.mark.parametrize("covariance", ["diagonal", "full"])
ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/loo-fid.md"
REFERENCE = af.FeatureMoments.of(deletion.features(64, 6, 1), extractor="pool", preprocessing="antialias")


def measured(history: list[Tensor], reference: af.FeatureMoments, beta: float, covariance: str) -> af.LeaveOneOutFID:
    distance = af.LeaveOneOutFID(reference, beta, covariance)
    for rows in history:
        distance.update(rows)
    return distance


def error(ours: Tensor, true: Tensor) -> float:
    """The largest, in standard deviations of the rewards."""
    return float((ours - true).abs().max() / true.std())


@BOTH
@given(
    count=st.integers(3, 9), width=st.integers(1, 6), updates=st.integers(0, 3), beta=st.sampled_from([0.0, 0.5, 0.99]),
    shift=st.sampled_from([0.0, 0.3, 30.0]), scale=st.sampled_from([1e-3, 1.0, 20.0]), seed=st.integers(0, 999),
)  # fmt: skip
def test_rewards_are_those_of_deletion(
    covariance: str, count: int, width: int, updates: int, beta: float, shift: float, scale: float, seed: int
) -> None:
    reference = af.FeatureMoments.of(deletion.features(40, width, seed + 1000))
    history = [deletion.features(5 + i, width, seed + i, shift=0.1 * i * scale, scale=scale) for i in range(updates)]
    batch = deletion.features(count, width, seed + 500, shift=shift * scale, scale=scale)
    ours = measured(history, reference, beta, covariance).reward(batch)
    true = deletion.rewards(history, batch, reference, beta, covariance)
    # The truth subtracts distances: their rounding is (N - 1) / (1 - beta) times as large in a reward.
    whole = float(deletion.distance([(1.0, batch)], reference, covariance))
    torch.testing.assert_close(ours, true, rtol=1e-6, atol=2e-6 * float(true.std()) + 1e-11 * whole)


@pytest.mark.parametrize("beta", [0.5, 0.99])
def test_diagonal_is_exact_in_float32(beta: float) -> None:
    """Of features as networks have them: none negative, means beyond their spread."""
    history, batch = [deletion.features(96, 64, seed, shift=4.0).relu().float() for seed in (2, 3)]
    reference = af.FeatureMoments.of(deletion.features(256, 64, 4, shift=4.1).relu())
    ours = measured([history], reference, beta, "diagonal").reward(batch)
    assert ours.dtype == torch.float32
    assert error(ours, deletion.rewards([history], batch, reference, beta, "diagonal")) < 1e-6


@pytest.mark.parametrize("count", [24, 96])
@pytest.mark.parametrize("beta", [0.0, 0.5, 0.99])
def test_full_is_exact_with_fewer_and_with_more_images_than_features(count: int, beta: float) -> None:
    width = 48
    history, batch = deletion.features(count, width, 2), deletion.features(count, width, 3, scale=0.8, shift=0.1)
    reference = af.FeatureMoments.of(deletion.features(300, width, 4))
    ours = measured([history], reference, beta, "full").reward(batch)
    assert error(ours, deletion.rewards([history], batch, reference, beta, "full")) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("count", [144, 1152])
def test_full_is_exact_with_512_features(count: int) -> None:
    history, batch = deletion.features(count, 512, 2), deletion.features(count, 512, 3, scale=0.8, shift=0.1)
    reference = af.FeatureMoments.of(deletion.features(4096, 512, 4))
    some = range(0, count, count // 8)
    ours = measured([history], reference, 0.5, "full").reward(batch)[some]
    whole = deletion.distance([(0.5, history), (0.5, batch)], reference, "full")
    without = [torch.cat([batch[:i], batch[i + 1 :]]) for i in some]
    true = torch.stack([deletion.distance([(0.5, history), (0.5, rows)], reference, "full") for rows in without])
    assert error(ours, (true - whole) * (count - 1) / 0.5) < 1e-5


def test_a_reference_of_fewer_images_than_features_serves() -> None:
    reference = af.FeatureMoments.of(deletion.features(5, 12, 1))
    history, batch = deletion.features(20, 12, 2), deletion.features(20, 12, 3)
    ours = measured([history], reference, 0.5, "full").reward(batch)
    assert error(ours, deletion.rewards([history], batch, reference, 0.5, "full")) < 1e-6


def test_full_keeps_its_digits_where_variances_fall_steeply() -> None:
    """The level that all rewards share, too: it is the same for turned features, over eleven orders of magnitude."""
    width, falling = 96, torch.arange(1, 97, dtype=torch.float64) ** -3.0
    turn = torch.linalg.qr(deletion.features(width, width, 5)).Q
    reference, history, batch = (deletion.features(n, width, n) * falling for n in (384, 200, 201))
    plain, turned = (
        measured([history @ q], af.FeatureMoments.of(reference @ q), 0.99, "full").reward(batch @ q)
        for q in (torch.eye(width, dtype=torch.float64), turn)
    )
    off = turned - plain
    assert float(off.mean().abs() / plain.std()) < 1e-7
    assert error(turned, plain) < 1e-6


@BOTH
@pytest.mark.parametrize("reference", [REFERENCE, af.FeatureMoments.of(torch.ones(1, 6))], ids=["spread", "one image"])
def test_a_batch_of_one_image_repeated_has_rewards_of_zero(covariance: str, reference: af.FeatureMoments) -> None:
    """Nothing changes when one of them goes; and no spread is divided by."""
    rewards = af.LeaveOneOutFID(reference, covariance=covariance).reward(torch.full((4, 6), 0.1))
    assert rewards.tolist() == pytest.approx([0.0] * 4, abs=1e-6)


@BOTH
def test_before_the_first_update_the_batch_alone_counts(covariance: str) -> None:
    batch = deletion.features(7, 6, 2)
    alone = af.LeaveOneOutFID(REFERENCE, 0.0, covariance).reward(batch)
    assert torch.equal(af.LeaveOneOutFID(REFERENCE, 0.9, covariance).reward(batch), alone)
    assert error(alone, deletion.rewards([], batch, REFERENCE, 0.0, covariance)) < 1e-6


@BOTH
def test_fid_is_the_distance_of_what_was_taken_in(covariance: str) -> None:
    first, second = deletion.features(7, 6, 2), deletion.features(9, 6, 3, shift=1.0)
    distance = measured([first, second], REFERENCE, 0.75, covariance)
    true = deletion.distance([(0.75, first), (0.25, second)], REFERENCE, covariance)
    torch.testing.assert_close(distance.fid(), true, rtol=1e-10, atol=0)
    assert distance.updates == 2


@BOTH
def test_the_weight_of_all_images_is_one_from_the_first_update_on(covariance: str) -> None:
    """The released trainer, given statistics to start from, has 0.75 of it after one update, 0.875 after two."""
    rows = deletion.features(8, 6, 2, shift=3.0)
    fids = []
    distance = af.LeaveOneOutFID(REFERENCE, 0.5, covariance)
    for _ in range(4):
        distance.update(rows)
        fids.append(float(distance.fid()))
    assert fids == pytest.approx([float(deletion.distance([(1.0, rows)], REFERENCE, covariance))] * 4, rel=1e-12)


@BOTH
def test_an_advantages_epsilon_is_beside_the_reward_at_every_beta(covariance: str) -> None:
    """Without the factor (N - 1) / (1 - beta), 1e-4 takes more than half of the advantages at beta 0.99 here."""
    history, batch = deletion.features(256, 6, 2, scale=0.1), deletion.features(256, 6, 3, scale=0.1)
    rewards = measured([history], REFERENCE, 0.99, covariance).reward(batch)
    options: dict[str, Any] = {"norm": "group_std", "clip": None}
    exact = af.group_advantages(rewards, 8, eps=0.0, **options)
    kept = [
        float((af.group_advantages(scaled, 8, eps=1e-4, **options) / exact).median())
        for scaled in (rewards, rewards * 0.01 / 255)
    ]
    assert kept[0] > 0.99 and kept[1] < 0.5


@BOTH
def test_an_image_unlike_a_collapsed_batch_helps_and_its_copies_do_not(covariance: str) -> None:
    mode = deletion.features(1, 6, 2, shift=0.5)
    batch = torch.cat([mode.expand(15, 6) + 1e-3 * deletion.features(15, 6, 3), -mode])
    rewards = af.LeaveOneOutFID(REFERENCE, covariance=covariance).reward(batch)
    assert rewards[-1] > 0 > rewards[:-1].max()


@BOTH
def test_an_image_that_is_not_finite_is_as_if_absent(covariance: str) -> None:
    history, batch = deletion.features(9, 6, 2), deletion.features(8, 6, 3).float()
    damaged = torch.cat([batch[:3], torch.full((1, 6), torch.inf), batch[3:], batch[:1]])
    damaged[-1, 2] = torch.nan
    clean, hurt = (measured([history], REFERENCE, 0.5, covariance) for _ in range(2))
    rewards = hurt.reward(damaged)
    assert rewards.isnan().nonzero().flatten().tolist() == [3, 9]
    torch.testing.assert_close(rewards[[0, 1, 2, 4, 5, 6, 7, 8]], clean.reward(batch), rtol=1e-6, atol=0)
    clean.update(batch)
    hurt.update(damaged)
    torch.testing.assert_close(hurt.fid(), clean.fid(), rtol=1e-12, atol=0)
    assert (clean.dropped, hurt.dropped) == (0, 2)


@BOTH
@pytest.mark.parametrize("huge", [torch.tensor(1e200, dtype=torch.float64), torch.tensor(3e38)], ids=["1e200", "3e38"])
def test_an_image_beyond_all_sums_is_as_if_absent(covariance: str, huge: Tensor) -> None:
    batch = deletion.features(8, 6, 3)
    damaged = torch.cat([batch, torch.zeros(1, 6, dtype=torch.float64)]).to(huge.dtype)
    damaged[-1, 2] = -huge
    batch = damaged[:-1]
    distance = measured([deletion.features(9, 6, 2)], REFERENCE, 0.5, covariance)
    rewards = distance.reward(damaged)
    torch.testing.assert_close(rewards[:-1], distance.reward(batch), rtol=1e-6, atol=0)
    assert rewards[-1].isnan()
    distance.update(damaged)
    assert distance.dropped == 1 and float(distance.fid()) < 100


@BOTH
def test_a_batch_without_two_finite_images_has_no_rewards_and_moves_nothing(covariance: str) -> None:
    distance = measured([deletion.features(9, 6, 2)], REFERENCE, 0.5, covariance)
    before = distance.fid()
    rows = torch.full((3, 6), torch.nan)
    distance.update(rows)
    assert torch.equal(distance.fid(), before) and (distance.updates, distance.dropped) == (1, 3)
    rows[1] = 0.0
    assert distance.reward(rows).isnan().all()


@BOTH
def test_rewards_follow_their_images_and_change_nothing(covariance: str, device: str) -> None:
    history, batch = deletion.features(9, 6, 2).to(device), deletion.features(8, 6, 3).to(device)
    distance = measured([history], REFERENCE.to(device), 0.5, covariance)
    rewards = distance.reward(batch)
    assert torch.equal(distance.reward(batch), rewards)
    order = torch.tensor([3, 1, 7, 0, 5, 2, 6, 4], device=device)
    torch.testing.assert_close(distance.reward(batch[order]), rewards[order], rtol=1e-9, atol=1e-12)
    assert rewards.device == batch.device
    assert error(rewards.cpu(), deletion.rewards([history.cpu()], batch.cpu(), REFERENCE, 0.5, covariance)) < 1e-6


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_any_float_features_are_taken_for_what_they_are(covariance: str, dtype: torch.dtype) -> None:
    batch = deletion.features(8, 6, 3).to(dtype).requires_grad_()
    rewards = af.LeaveOneOutFID(REFERENCE, covariance=covariance).reward(batch)
    assert rewards.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert not rewards.requires_grad
    true = deletion.rewards([], batch.detach(), REFERENCE, 0.0, covariance)
    assert error(rewards.double(), true) < 1e-6


@BOTH
def test_a_state_goes_on_bit_for_bit(covariance: str) -> None:
    first, second, third = (deletion.features(8, 6, seed) for seed in (2, 3, 4))
    distance = measured([first], REFERENCE, 0.5, covariance)
    again = af.LeaveOneOutFID(REFERENCE, 0.5, covariance)
    state = distance.state_dict()
    again.load_state_dict(state)
    for each in (distance, again):
        each.update(second)
    assert torch.equal(again.reward(third), distance.reward(third)) and again.updates == 2
    fresh = af.LeaveOneOutFID(REFERENCE, 0.5, covariance)
    fresh.load_state_dict(state)  # which the updates since have left alone
    assert fresh.updates == 1 and torch.equal(fresh.fid(), measured([first], REFERENCE, 0.5, covariance).fid())


TWO_RANKS = """
import sys, torch
from torch import distributed
import advflow_ext as af
from tests.distribution import deletion
rank = int(sys.argv[1])
distributed.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
reference = af.FeatureMoments.of(deletion.features(64, 6, 1))
share = [slice(0, 5), slice(5, 9)][rank]
for covariance in ("diagonal", "full"):
    distance = af.LeaveOneOutFID(reference, 0.5, covariance, distributed.group.WORLD if rank else None)
    distance.update(deletion.features(9, 6, 2)[share])
    distance.update(deletion.features(9, 6, 3)[[slice(0, 9), slice(9, 9)][rank]])
    batch = deletion.features(9, 6, 4)
    batch[6] = torch.nan
    alone = distance.reward(batch[[slice(0, 0), slice(0, 9)][rank]])
    print(repr([distance.reward(batch[share]).tolist(), distance.fid().item(), len(alone), distance.dropped]))
"""


def test_split_over_ranks_is_what_one_rank_has(tmp_path: Any) -> None:
    command = [sys.executable, "-c", TWO_RANKS]
    jobs = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "meet")], stdout=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    told = [job.communicate(timeout=120)[0].splitlines() for job in jobs]
    nan = float("nan")
    batch = deletion.features(9, 6, 4)
    batch[6] = nan
    for row, covariance in enumerate(("diagonal", "full")):
        (first, fid, none, _), (second, fid_too, nine, _) = (eval(lines[row], {"nan": nan}) for lines in told)
        alone = measured([deletion.features(9, 6, seed) for seed in (2, 3)], REFERENCE, 0.5, covariance)
        assert [*first, *second] == pytest.approx(alone.reward(batch).tolist(), rel=1e-9, nan_ok=True)
        assert fid == fid_too == pytest.approx(float(alone.fid()), rel=1e-12)
        assert (len(first), len(second), none, nine) == (5, 4, 0, 9)


GOOD = torch.ones(3, 6)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: af.LeaveOneOutFID(GOOD), r"reference is a Tensor; accepted is an advflow_ext.FeatureMoments"),
        (lambda: af.LeaveOneOutFID(REFERENCE, 1.0), r"beta is 1.0; accepted is a number of at least 0 and below 1"),
        (lambda: af.LeaveOneOutFID(REFERENCE, covariance="whole"), r"covariance is 'whole'; accepted are 'diagonal', "),
        (lambda: af.LeaveOneOutFID(REFERENCE).reward(GOOD[:1]), r"features has 1 rows, of all ranks; .* at least 2"),
        (lambda: af.LeaveOneOutFID(REFERENCE).reward(GOOD[:0]), r"features has 0 rows, of all ranks; .* at least 2"),
        (lambda: af.LeaveOneOutFID(REFERENCE).update(GOOD[:0]), r"features has 0 rows, of all ranks; .* at least 1"),
        (
            lambda: af.LeaveOneOutFID(REFERENCE).reward(GOOD[:, :5]),
            r"features has shape \[3, 5\]; accepted is \[N, 6\]",
        ),
        (lambda: af.LeaveOneOutFID(REFERENCE).reward(GOOD[0]), r"features has shape \[6\]; accepted is \[N, 6\]"),
        (lambda: af.LeaveOneOutFID(REFERENCE).reward(GOOD.int()), r"features has dtype torch.int32; accepted are"),
        (lambda: af.LeaveOneOutFID(REFERENCE).reward(GOOD.to("meta")), r"features is on meta; accepted is the device"),
        (lambda: af.LeaveOneOutFID(REFERENCE).fid(), r"fid\(\) has no images to measure; accepted is an update\(\)"),
        (lambda: af.LeaveOneOutFID(REFERENCE).load_state_dict({"mean": 0}), r"state holds \['mean'\]; accepted are"),
    ],
)
def test_misuse_is_said_in_a_sentence(call: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        call()


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        ({"preprocessing": "no antialias"}, r"state\['preprocessing'\] is 'antialias'; .* reference's, 'no antialias'"),
        ({"covariance": "full"}, r"state\['covariance'\] has shape \[6\]; accepted is \[6, 6\]"),
    ],
)
def test_a_state_of_another_path_is_refused(other: dict[str, str], sentence: str) -> None:
    state = measured([GOOD], REFERENCE, 0.5, "diagonal").state_dict()
    words = {"extractor": "pool", "preprocessing": "antialias"} | other
    covariance = words.pop("covariance", "diagonal")
    reference = af.FeatureMoments(REFERENCE.mean, REFERENCE.covariance, 64, **words)
    with pytest.raises(ValueError, match=sentence):
        af.LeaveOneOutFID(reference, covariance=covariance).load_state_dict(state)


@pytest.mark.parametrize("name", ["mean", "covariance"])
def test_a_state_that_is_not_finite_is_refused(name: str) -> None:
    distance = measured([GOOD], REFERENCE, 0.5, "diagonal")
    state = distance.state_dict()
    state[name] = torch.where(torch.arange(6) == 3, torch.inf, state[name])
    with pytest.raises(ValueError, match=rf"state\['{name}'\] holds numbers that are not finite; accepted are finite"):
        distance.load_state_dict(state)
    assert distance.fid().isfinite()


def test_the_page_is_what_there_is() -> None:
    page = PAGE.read_text()
    names: dict[str, Any] = {}
    exec(re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)[0], names)
    assert names["rewards"].shape == (32,) and names["advantages"].isfinite().all() and names["distance"].updates == 1
    parameters = list(inspect.signature(af.LeaveOneOutFID).parameters.values())[1:]
    written = re.findall(r"^\| `(\w+)` \| `(.+?)` \|", page, re.MULTILINE)
    assert written == [(each.name, repr(each.default)) for each in parameters]


def test_the_numbers_of_the_page_are_those_of_the_file() -> None:
    table = PAGE.read_text().partition("<!-- measured -->")[2].partition("<!-- /measured -->")[0].strip()
    measurements = json.loads((ROOT / "bench/results/loo-fid-cpu.json").read_text())
    assert [line.strip("| ").split(" | ") for line in table.split("\n")[2:]] == [
        [
            *(f"{row[name]}" for name in ("covariance", "features", "images", "beta")),
            f"{row['error_over_std']:.0e}".replace("e-0", "e-"),
            f"{row['seconds']:.2g}",
            f"{row['seconds_by_deletion']:,.0f}",
            f"{row['seconds_by_deletion'] / row['seconds']:,.0f}x",
        ]
        for row in measurements["results"]
    ]
    assert all(
        row["error_over_std"] < (1e-6 if row["covariance"] == "diagonal" else 1e-5) for row in measurements["results"]
    )
    for row in measurements["agreement"]:
        assert f"{row['spearman']:.2f} at $\\beta$ = {row['beta']}" in PAGE.read_text()
