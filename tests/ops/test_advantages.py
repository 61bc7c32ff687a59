"""Advantage maps against numbers worked out by hand and the properties each mode promises."""

from __future__ import annotations

import numpy as np
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


OF_PAPER = {"clip_rewards": None, "clip": None, "eps": 0.0}  # eq. 11, g the deviation of all raw rewards


def released(values, group_size, *, gate=False, temperature=1.0, group_std=False):
    """Fuzm7/FlowAWR's stat_tracking.py in its own words: energies of one group at a time."""
    raw, energies = values.double().numpy(), []
    for rewards in raw.reshape(-1, group_size):
        std = np.std(rewards if group_std else raw) + 1e-4
        advantages = np.clip((rewards - rewards.mean()) / std, -5, 5) / temperature
        exponentials = np.exp(advantages - advantages.max())
        excess = exponentials / exponentials.sum() - 1 / group_size
        excess = excess / np.maximum(np.std(excess) + 1e-4, 1e-2) if gate else excess * group_size
        energies.append(np.clip(excess, -3, 3))
    return torch.from_numpy(np.concatenate(energies))


def test_softmax_by_hand():
    # Weights 1/6, 1/3, 1/2 of 3 images at temperature 1; equal rewards beside them.
    values = torch.tensor([1.0, 2.0, 3.0, 5.0, 5.0, 5.0], dtype=torch.float64)
    values[:3].log_()
    A = af.softmax_advantages(values, 3, norm="none")
    torch.testing.assert_close(A, torch.tensor([-0.5, 0, 0.5, 0, 0, 0], dtype=torch.float64))
    # p - 1/3 is -1/6, 0, 1/6, of deviation sqrt(2 / 3) / 6.
    gated = af.softmax_advantages(values, 3, norm="none", scale_by_std=True)
    expected = 1 / 6 / ((2 / 3) ** 0.5 / 6 + 1e-4)
    torch.testing.assert_close(gated, torch.tensor([-expected, 0, expected, 0, 0, 0], dtype=torch.float64))


@given(rewards, st.booleans(), st.booleans(), st.sampled_from([1.0, 0.3, 4.0]))
def test_softmax_is_the_released_code(values, gate, group_std, temperature):
    norm = "group_std" if group_std else "raw_global_std"
    A = af.softmax_advantages(values, 4, norm=norm, temperature=temperature, scale_by_std=gate)
    expected = released(values, 4, gate=gate, temperature=temperature, group_std=group_std)
    torch.testing.assert_close(A, expected, rtol=1e-9, atol=1e-9)


def test_softmax_of_sparse_successes_is_bounded():
    """One success in ten prompts of 24: eq. 11 gives 23 to 1, the released code 3."""
    values = torch.zeros(240, dtype=torch.float64)
    values[0] = 1
    assert af.softmax_advantages(values, 24, **OF_PAPER)[0] > 20
    for gate in (False, True):
        A = af.softmax_advantages(values, 24, scale_by_std=gate)
        assert A[0] == 3 and A.abs().max() == 3 and not A[24:].any()
    # Rewards are cut at five deviations before: here the success stands at (1 - 1/24) / sqrt(239) * 240 = 14.9.
    ratio = (5 + (1 / 24) / (values.std(correction=0) + 1e-4)).exp()
    p = ratio / (ratio + 23)
    torch.testing.assert_close(af.softmax_advantages(values, 24, clip=None)[0], 24 * p - 1)


def test_softmax_of_the_paper_is_reached_by_arguments():
    for values in (REWARDS, REWARDS + torch.arange(8)):
        for g, options in ((float(values.std(correction=0)), OF_PAPER), (0.7, {"norm": "none", "temperature": 0.7})):
            expected = 4 * torch.softmax(values.view(-1, 4) / g, 1) - 1
            A = af.softmax_advantages(values, 4, **{**OF_PAPER, **options})
            torch.testing.assert_close(A, expected.flatten())


def test_gate_gives_every_group_that_differs_the_same_scale():
    """But for groups that hardly differ, which the floor of 0.01 keeps small, and equal ones, which are 0."""
    values = torch.tensor([0.0, 1, 1, 0, 0, 8, 8, 0, 0, 1e-3, 1e-3, 0, 2, 2, 2, 2], dtype=torch.float64)
    A = af.softmax_advantages(values, 4, norm="none", scale_by_std=True).view(4, 4)
    assert A[0].std(correction=0) == pytest.approx(1, abs=1e-3) and A[1].std(correction=0) == pytest.approx(1, abs=1e-3)
    assert 0 < A[2].abs().max() < 0.02 and not A[3].any()


@given(rewards, st.sampled_from([0.1, 1.0, 10.0]))
def test_softmax_advantages_have_mean_zero_and_keep_their_range_and_order(values, temperature):
    A = af.softmax_advantages(values, 4, temperature=temperature, **OF_PAPER).view(-1, 4)
    assert A.mean(1).abs().max() <= 1e-12 and A.min() >= -1 and A.max() <= 3
    groups = values.view(-1, 4)
    better = groups[:, :, None] > groups[:, None, :]
    for options in (OF_PAPER, {}, {"scale_by_std": True}):
        A = af.softmax_advantages(values, 4, temperature=temperature, **options).view(-1, 4)
        assert (A[:, :, None] >= A[:, None, :])[better].all() and A.abs().max() <= 3


@given(rewards, st.floats(-50, 50), st.floats(0.5, 50))
def test_softmax_of_normalised_rewards_ignores_shift_and_positive_scale(values, shift, scale):
    if values.std(correction=0) < 1e-3:  # rounding of the shift decides there
        return
    torch.testing.assert_close(
        af.softmax_advantages(values * scale + shift, 4, eps=0.0),
        af.softmax_advantages(values, 4, eps=0.0),
        rtol=1e-6,
        atol=1e-6,
    )


@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, 1e8, -7.7])
@pytest.mark.parametrize("group_size", [3, 49])
def test_equal_rewards_give_exact_zeros_by_softmax(value, group_size):
    values = torch.full((2 * group_size,), value)
    for options in ({}, {"temperature": 1e-3}, {"scale_by_std": True}, OF_PAPER, {"norm": "group_std", "eps": 0.0}):
        assert not af.softmax_advantages(values, group_size, **options).any()


def test_far_apart_rewards_do_not_overflow():
    values = torch.tensor([1e6, -1e6, 0.0])
    options = {"norm": "none", "temperature": 1e-3, "clip_rewards": None}
    assert af.softmax_advantages(values, 3, **options).tolist() == [2, -1, -1]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("options", [{}, {"scale_by_std": True}, {"norm": "group_std"}, {"norm": "none"}, OF_PAPER])
def test_non_finite_reward_is_left_out_of_the_softmax(bad, options):
    values = torch.tensor([3.0, bad, 1.0, 5.0, bad, bad, bad, bad])
    A = af.softmax_advantages(values, 4, **options)
    kept = torch.tensor([3.0, 1.0, 5.0])
    torch.testing.assert_close(A[[0, 2, 3]], af.softmax_advantages(kept, 3, **options))
    assert A[1] == 0 and not A[4:].any()
    assert not af.softmax_advantages(torch.full((4,), bad), 2, **options).any()


def test_softmax_dtypes_empty_batch_and_graph():
    assert af.softmax_advantages(torch.tensor([1, 0, 0, 1]), 2).dtype == torch.float32
    assert af.softmax_advantages(torch.tensor([1.0, 0.0]).bfloat16(), 2).dtype == torch.float32
    assert af.softmax_advantages(REWARDS, 4).dtype == torch.float64
    for norm in ("raw_global_std", "group_std", "none"):
        assert af.softmax_advantages(torch.empty(0), 4, norm=norm, scale_by_std=True).shape == (0,)
    assert not af.softmax_advantages(REWARDS.clone().requires_grad_(), 4).requires_grad


@pytest.mark.parametrize(
    ("arguments", "options", "sentence"),
    [
        ((REWARDS, 3), {}, r"rewards has shape \[8\].*multiple of group_size 3"),
        ((REWARDS, 1), {}, r"group_size is 1; accepted is an integer of at least 2"),
        (([1.0, 2.0], 2), {}, r"rewards is list; accepted"),
        (
            (REWARDS, 4),
            {"norm": "batch_rms"},
            r"norm is 'batch_rms'; accepted are 'raw_global_std', 'group_std', 'none'",
        ),
        ((REWARDS, 4), {"temperature": 0.0}, r"temperature is 0.0; accepted is a finite number above 0"),
        ((REWARDS, 4), {"temperature": None}, r"temperature is None; accepted is a finite number above 0"),
        ((REWARDS, 4), {"clip_rewards": 0.0}, r"clip_rewards is 0.0; accepted is a finite number above 0"),
        ((REWARDS, 4), {"clip": float("inf")}, r"clip is inf; accepted is a finite number above 0"),
        ((REWARDS, 4), {"eps": -1e-4}, r"eps is -0.0001; accepted is a finite number of at least 0"),
        ((REWARDS, 4), {"scale_by_std": 0.01}, r"scale_by_std is 0.01; accepted are True and False"),
    ],
)
def test_misuse_of_softmax_is_said_in_a_sentence(arguments, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        af.softmax_advantages(*arguments, **options)
