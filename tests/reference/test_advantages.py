"""Advantage maps against numbers worked out by hand and the properties each mode promises."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import advflow_ext as af

# Two prompts, four images. Means 2 and 1; centred: -2 0 0 2 | 0 0 0 0; mean of squares 8 / 8 = 1.
REWARDS = torch.tensor([0.0, 2.0, 2.0, 4.0, 1.0, 1.0, 1.0, 1.0], dtype=torch.float64)

rewards = st.integers(1, 5).flatmap(
    lambda prompts: st.lists(st.floats(-100, 100, width=32), min_size=4 * prompts, max_size=4 * prompts)
).map(lambda values: torch.tensor(values, dtype=torch.float64))  # fmt: skip


def test_batch_rms_by_hand():
    A = af.group_advantages(REWARDS, 4, clip=None)
    torch.testing.assert_close(A, torch.tensor([-2.0, 0, 0, 2, 0, 0, 0, 0], dtype=torch.float64))
    assert af.group_advantages(REWARDS, 4).tolist() == [-1, 0, 0, 1, 0, 0, 0, 0]


def test_group_std_by_hand():
    A = af.group_advantages(REWARDS, 4, norm="group_std", clip=None, eps=0.0)
    root = 2**0.5
    torch.testing.assert_close(A, torch.tensor([-root, 0, 0, root, 0, 0, 0, 0], dtype=torch.float64))
    sample = af.group_advantages(REWARDS, 4, norm="group_std", clip=None, eps=0.0, ddof=1)
    torch.testing.assert_close(sample[0].item(), -2 / (8 / 3) ** 0.5)


def test_raw_global_std_is_numpy_std_of_raw_rewards_plus_eps():
    A = af.group_advantages(REWARDS, 4, norm="raw_global_std", clip=None)
    expected = torch.tensor([-2.0, 0, 0, 2, 0, 0, 0, 0], dtype=torch.float64) / (REWARDS.std(correction=0) + 1e-4)
    torch.testing.assert_close(A, expected)


def test_diffusion_nft_convention():
    A = af.group_advantages(REWARDS, 4, norm="raw_global_std", clip=5.0, clip_mode="clip_divide")
    unclipped = af.group_advantages(REWARDS, 4, norm="raw_global_std", clip=None)
    torch.testing.assert_close(A, unclipped.clamp(-5, 5) / 5)


def test_one_success_in_eight_shows_what_each_mode_does_to_the_sum():
    binary = torch.tensor([1.0] + [0.0] * 7)
    # Centred .875 and -.125; RMS = sqrt(.875 * .125) = .3307: 2.6458 and -.37796.
    assert af.group_advantages(binary, 8).sum().item() == pytest.approx(1 - 7 * 0.125 / 0.109375**0.5)
    assert af.group_advantages(binary, 8, clip_mode="recentre").sum().item() == pytest.approx(0, abs=1e-6)
    scaled = af.group_advantages(binary, 8, clip_mode="scale")
    torch.testing.assert_close(scaled, torch.tensor([1.0] + [-1 / 7] * 7))


@given(rewards, st.sampled_from(["batch_rms", "group_std", "raw_global_std"]))
def test_unclipped_scaled_and_recentred_groups_sum_to_zero(values, norm):
    for options in ({"clip": None}, {"clip_mode": "scale"}, {"clip_mode": "recentre"}):
        A = af.group_advantages(values, 4, norm=norm, **options)
        assert A.view(-1, 4).sum(1).abs().max().item() <= 1e-9


@given(rewards, st.sampled_from(["clip", "scale", "clip_divide"]), st.sampled_from([0.5, 1.0, 5.0]))
def test_bound_is_kept(values, mode, clip):
    A = af.group_advantages(values, 4, clip=clip, clip_mode=mode)
    assert A.abs().max().item() <= (1.0 if mode == "clip_divide" else clip) * (1 + 1e-12)


@given(rewards, st.floats(-50, 50), st.floats(0.5, 50))
def test_batch_rms_ignores_shift_and_positive_scale(values, shift, scale):
    centred = values.view(-1, 4) - values.view(-1, 4).mean(1, keepdim=True)
    if centred.square().mean().sqrt() < 1e-3:  # the floor on Z decides there
        return
    A = af.group_advantages(values, 4)
    torch.testing.assert_close(af.group_advantages(values * scale + shift, 4), A, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("norm", ["batch_rms", "group_std", "raw_global_std"])
@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, 1e8, -7.7])
def test_equal_rewards_give_exact_zeros(norm, value):
    assert not af.group_advantages(torch.full((12,), value), 3, norm=norm, eps=0.0).any()


@pytest.mark.parametrize("norm", ["batch_rms", "group_std", "raw_global_std"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_reward_is_left_out(norm, bad):
    values = torch.tensor([3.0, bad, 1.0, 5.0, 2.0, 2.5, bad, bad])
    A = af.group_advantages(values, 4, norm=norm, clip=None)
    assert A.isfinite().all() and A[1] == 0 and (A[6:] == 0).all()
    torch.testing.assert_close(A[[0, 2, 3]].sum().item(), 0.0, atol=1e-6, rtol=0)
    kept = torch.tensor([3.0, 1, 5, 2, 2.5], dtype=torch.float64)
    centred = torch.tensor([0.0, -2, 2, -0.25, 0.25], dtype=torch.float64)
    if norm == "batch_rms":
        expected = centred / centred.square().mean().sqrt()
    elif norm == "raw_global_std":
        expected = centred / (kept.std(correction=0) + 1e-4)
    else:
        spread = torch.tensor([(8 / 3) ** 0.5] * 3 + [0.25] * 2, dtype=torch.float64)
        expected = centred / (spread + 1e-4)
    torch.testing.assert_close(A[[0, 2, 3, 4, 5]].double(), expected, rtol=1e-6, atol=1e-6)


def test_all_rewards_non_finite_gives_zeros():
    assert not af.group_advantages(torch.full((4,), float("nan")), 2).any()


def test_dtypes_and_empty_batch():
    assert af.group_advantages(torch.tensor([1, 0, 0, 1]), 2).dtype == torch.float32
    assert af.group_advantages(torch.tensor([True, False]), 2).tolist() == [1, -1]
    assert af.group_advantages(torch.tensor([1.0, 0.0]).bfloat16(), 2).dtype == torch.float32
    assert af.group_advantages(REWARDS, 4).dtype == torch.float64
    for norm in ("batch_rms", "group_std", "raw_global_std"):
        assert af.group_advantages(torch.empty(0), 4, norm=norm).shape == (0,)


def test_rewards_keep_no_graph():
    assert not af.group_advantages(REWARDS.clone().requires_grad_(), 4).requires_grad


@pytest.mark.parametrize(
    ("arguments", "options", "sentence"),
    [
        ((REWARDS, 3), {}, r"rewards has shape \[8\].*multiple of group_size 3"),
        ((REWARDS.view(2, 4), 4), {}, r"rewards has shape \[2, 4\]; accepted is \[L\*K\]"),
        ((REWARDS, 1), {}, r"group_size is 1; accepted is an integer of at least 2"),
        ((REWARDS, 2.0), {}, r"group_size is 2.0; accepted"),
        (([1.0, 2.0], 2), {}, r"rewards is list; accepted"),
        ((REWARDS, 4), {"norm": "rms"}, r"norm is 'rms'; accepted are 'batch_rms', 'group_std', 'raw_global_std'"),
        ((REWARDS, 4), {"clip_mode": "hard"}, r"clip_mode is 'hard'; accepted are 'clip', 'recentre'"),
        ((REWARDS, 4), {"clip": 0.0}, r"clip is 0.0; accepted is a finite number above 0"),
        ((REWARDS, 4), {"eps": -1.0}, r"eps is -1.0; accepted is a finite number of at least 0"),
        ((REWARDS, 4), {"ddof": -1}, r"ddof is -1; accepted is an integer of at least 0"),
    ],
)
def test_misuse_is_said_in_a_sentence(arguments, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        af.group_advantages(*arguments, **options)


# ---------------------------------------------------------------------------------------------------------------------
# softmax_advantages


def test_softmax_by_hand():
    # Weights 1/6, 1/3, 1/2 of 3 images at temperature 1; equal rewards beside them.
    values = torch.tensor([1.0, 2.0, 3.0, 5.0, 5.0, 5.0], dtype=torch.float64)
    values[:3].log_()
    A = af.softmax_advantages(values, 3, temperature=1.0)
    torch.testing.assert_close(A, torch.tensor([-0.5, 0, 0.5, 0, 0, 0], dtype=torch.float64))
    scaled = af.softmax_advantages(values, 3, temperature=1.0, scale_by_std=True)
    torch.testing.assert_close(scaled, A / (0.5 / 6) ** 0.5)


def test_default_temperature_is_the_deviation_of_all_raw_rewards():
    for values in (REWARDS, REWARDS + torch.arange(8)):
        explicit = af.softmax_advantages(values, 4, temperature=float(values.std(correction=0)))
        torch.testing.assert_close(af.softmax_advantages(values, 4), explicit)


def test_floors_of_temperature_and_deviation():
    tiny = torch.tensor([0.0, 1e-9], dtype=torch.float64)
    torch.testing.assert_close(af.softmax_advantages(tiny, 2), af.softmax_advantages(tiny, 2, temperature=1e-6))
    small = af.softmax_advantages(tiny, 2)
    torch.testing.assert_close(af.softmax_advantages(tiny, 2, scale_by_std=True), small / 0.01)


@given(rewards, st.sampled_from([None, 0.1, 10.0]))
def test_softmax_advantages_have_mean_zero_and_keep_their_range_and_order(values, temperature):
    A = af.softmax_advantages(values, 4, temperature=temperature).view(-1, 4)
    assert A.mean(1).abs().max() <= 1e-12 and A.min() >= -1 and A.max() <= 3
    groups = values.view(-1, 4)
    better = groups[:, :, None] > groups[:, None, :]
    assert (A[:, :, None] >= A[:, None, :])[better].all()


@given(rewards, st.floats(-50, 50), st.floats(0.5, 50))
def test_softmax_of_the_default_temperature_ignores_shift_and_positive_scale(values, shift, scale):
    if values.std(correction=0) < 1e-3:  # the floor on the temperature decides there
        return
    torch.testing.assert_close(
        af.softmax_advantages(values * scale + shift, 4), af.softmax_advantages(values, 4), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, 1e8, -7.7])
@pytest.mark.parametrize("group_size", [3, 49])
def test_equal_rewards_give_exact_zeros_by_softmax(value, group_size):
    values = torch.full((2 * group_size,), value)
    for options in ({}, {"temperature": 1e-3}, {"scale_by_std": True}):
        assert not af.softmax_advantages(values, group_size, **options).any()


def test_far_apart_rewards_do_not_overflow():
    assert af.softmax_advantages(torch.tensor([1e6, -1e6, 0.0]), 3, temperature=1e-3).tolist() == [2, -1, -1]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_reward_is_left_out_of_the_softmax(bad):
    values = torch.tensor([3.0, bad, 1.0, 5.0, bad, bad, bad, bad])
    A = af.softmax_advantages(values, 4)
    kept = torch.tensor([3.0, 1.0, 5.0])
    torch.testing.assert_close(A[[0, 2, 3]], af.softmax_advantages(kept, 3))
    assert A[1] == 0 and not A[4:].any()
    assert not af.softmax_advantages(torch.full((4,), bad), 2, scale_by_std=True).any()


def test_softmax_dtypes_empty_batch_and_graph():
    assert af.softmax_advantages(torch.tensor([1, 0, 0, 1]), 2).dtype == torch.float32
    assert af.softmax_advantages(torch.tensor([1.0, 0.0]).bfloat16(), 2).dtype == torch.float32
    assert af.softmax_advantages(REWARDS, 4).dtype == torch.float64
    assert af.softmax_advantages(torch.empty(0), 4, scale_by_std=True).shape == (0,)
    assert not af.softmax_advantages(REWARDS.clone().requires_grad_(), 4).requires_grad


@pytest.mark.parametrize(
    ("arguments", "options", "sentence"),
    [
        ((REWARDS, 3), {}, r"rewards has shape \[8\].*multiple of group_size 3"),
        ((REWARDS, 1), {}, r"group_size is 1; accepted is an integer of at least 2"),
        (([1.0, 2.0], 2), {}, r"rewards is list; accepted"),
        ((REWARDS, 4), {"temperature": 0.0}, r"temperature is 0.0; accepted is a finite number above 0"),
        ((REWARDS, 4), {"scale_by_std": 0.01}, r"scale_by_std is 0.01; accepted are True and False"),
    ],
)
def test_misuse_of_softmax_is_said_in_a_sentence(arguments, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        af.softmax_advantages(*arguments, **options)
