"""AdaGRPO's state and advantages: the authors' numbers by hand, and the properties of either part."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.utils import counters
from torch._subclasses import FakeTensorMode

import advflow_ext as af
from advflow_ext.contract import numbers

K = 4
NAN, INF = float("nan"), float("inf")
# Multiples of 1/16 are exact in float64, so that a reward stands above, on or below the mean and nowhere in between.
sixteenths = st.integers(-1600, 1600).map(lambda n: n / 16)
groups = st.integers(1, 5).flatmap(lambda n: st.lists(sixteenths, min_size=K * n, max_size=K * n)).map(
    lambda values: torch.tensor(values, dtype=torch.float64)
)  # fmt: skip
variances = st.floats(1e-3, 1e4)


def tracker_of(*batches: list[float], decay: float = 0.8) -> af.CapabilityTracker:
    tracker = af.CapabilityTracker(decay)
    for scores in batches:
        tracker.observe(torch.tensor(scores))
    return tracker


# ---------------------------------------------------------------------------------------------------------------------
# The state


# Means 3, 3, 7, 2 and variances 2.5, 9, 1.5, 1 of four batches; the first ones as they are, then 4/5 old + 1/5 new.
# The authors' sample_evaluate_and_select_ema gives the same numbers and chooses the same prompts.
STREAM = [[1.0, 2, 4, 5], [0, 2, 2, 8], [6, 6, 7, 9], [3, 1, 1, 3]]
TRACE = [(3.0, 2.5, 1), (3.0, 3.8, 1), (3.8, 3.34, 0), (3.44, 2.872, 0)]


def test_the_trace_of_a_score_stream():
    tracker = af.CapabilityTracker()
    for scores, (mean, variance, chosen) in zip(STREAM, TRACE, strict=True):
        tracker.observe(torch.tensor(scores))
        assert tracker.mean.item() == pytest.approx(mean, abs=1e-15)
        assert tracker.variance.item() == pytest.approx(variance, abs=1e-15)
        assert tracker.pick(torch.tensor(scores), 1).tolist() == [chosen]


def test_picks_are_the_nearest_first():
    tracker = tracker_of([2.0, 4.0])  # mean 3
    scores = torch.tensor([9.0, 2.5, float("nan"), 4.0, 2.0, float("inf")])
    assert tracker.pick(scores, 3).tolist() == [1, 3, 4]
    assert tracker.pick(scores, 6).tolist() == [1, 3, 4, 0, 2, 5]  # all of them, those without a score last


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_scores_that_are_not_finite_are_left_out(bad):
    tracker = tracker_of([bad, bad])
    assert tracker.mean.isnan() and tracker.variance.isnan()
    tracker.observe(torch.tensor([1.0, bad, 3.0]))
    assert (tracker.mean, tracker.variance) == (2, 1)
    for scores in (torch.tensor([bad]), torch.empty(0)):
        tracker.observe(scores)
        assert (tracker.mean, tracker.variance) == (2, 1)


@pytest.mark.parametrize("scores", [[1.7e308, -1.7e308], [1e200, 3e200]])
def test_scores_whose_moments_are_beyond_float64_move_nothing(scores):
    tracker = af.CapabilityTracker()
    tracker.observe(torch.tensor(scores, dtype=torch.float64))
    assert tracker.mean.isnan() and tracker.variance.isnan()
    tracker.observe(torch.tensor([1.0, 3.0]))
    tracker.observe(torch.tensor(scores, dtype=torch.float64))
    assert (tracker.mean, tracker.variance) == (2, 1)


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e8, -7.7])
def test_equal_scores_have_no_variance(value):
    assert tracker_of([value] * 7).variance == 0


@given(st.lists(sixteenths, min_size=1, max_size=9), st.lists(sixteenths, min_size=1, max_size=9))
def test_mean_and_variance_are_those_of_the_definition(first, then):
    tracker = tracker_of(first, then, decay=0.75)
    one, other = torch.tensor(first, dtype=torch.float64), torch.tensor(then, dtype=torch.float64)
    torch.testing.assert_close(tracker.mean, 0.75 * one.mean() + 0.25 * other.mean())
    torch.testing.assert_close(tracker.variance, 0.75 * one.var(correction=0) + 0.25 * other.var(correction=0))


def test_a_state_goes_on_to_the_same_bits():
    tracker = tracker_of(*STREAM[:2])
    for state in (tracker.state_dict(), {key: value.item() for key, value in tracker.state_dict().items()}):
        other = af.CapabilityTracker()
        other.load_state_dict(state)
        other.observe(torch.tensor(STREAM[2]))
        whole = tracker_of(*STREAM[:3])
        assert (other.mean, other.variance) == (whole.mean, whole.variance)
    assert tracker.mean == tracker_of(*STREAM[:2]).mean  # who went on with its state has left it alone


def test_what_is_no_state_is_refused():
    tracker = af.CapabilityTracker()
    with pytest.raises(ValueError, match=r"state holds \['mean'\]; accepted are 'mean' and 'variance'"):
        tracker.load_state_dict({"mean": 1.0})
    with pytest.raises(ValueError, match=r"state\['variance'\] is 'x'; accepted is a number or a tensor of shape \[\]"):
        tracker.load_state_dict({"mean": 1.0, "variance": "x"})
    for mean, variance in ((1.0, -0.5), (1.0, INF), (INF, 1.0), (NAN, 1.0), (1.0, NAN)):
        with pytest.raises(
            ValueError, match=rf"a mean of {mean:g} and a variance of {variance:g}; accepted are finite"
        ):
            tracker.load_state_dict({"mean": mean, "variance": torch.tensor(variance)})
    assert tracker.mean.isnan() and tracker.variance.isnan()
    tracker.load_state_dict(af.CapabilityTracker().state_dict())
    tracker.observe(torch.tensor([1.0, 3.0]))
    assert (tracker.mean, tracker.variance) == (2, 1)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: af.CapabilityTracker(decay=1.0), r"decay is 1.0; accepted is a number of at least 0 and below 1"),
        (lambda: af.CapabilityTracker(process_group="world", per_rank=True), r"per_rank is True with a process_group"),
        (lambda: af.CapabilityTracker(per_rank=1), r"per_rank is 1; accepted are True and False"),
        (lambda: af.CapabilityTracker().observe([1.0]), r"scores is list; accepted is a real torch.Tensor of shape \["),
        (lambda: tracker_of([1.0]).observe(torch.ones(2, 1)), r"scores is a tensor torch.float32 \[2, 1\]; accepted"),
        (lambda: tracker_of([1.0]).pick(torch.ones(2), 3), r"k is 3; accepted is an integer from 1 to .* 2"),
        (lambda: tracker_of([1.0]).pick(torch.ones(2), True), r"k is True; accepted"),
        (lambda: af.CapabilityTracker().pick(torch.ones(2), 1), r"accepted is an observe\(\) of finite scores before"),
    ],
)
def test_misuse_of_a_tracker_is_said_in_a_sentence(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


# Eight scores, five on one rank and three on the other, one of them without a number; then one rank has none at all.
# Forked, so that torch is loaded once.
TWO_RANKS = """
import json, os, sys, torch
import advflow_ext as af
from torch import distributed
child = os.fork()
rank = 0 if child else 1
distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=rank, world_size=2)
mine = torch.tensor([[1.0, 2, 4, 5, float("nan")], [0.0, 2, 7]][rank])
states = []
for tracker in (af.CapabilityTracker(), af.CapabilityTracker(process_group=distributed.group.WORLD),
                af.CapabilityTracker(per_rank=True)):
    tracker.observe(mine)
    tracker.observe(torch.tensor([6.0] * rank))
    states.append([tracker.mean.item(), tracker.variance.item()])
of_the_first = af.CapabilityTracker(process_group=distributed.new_group([0]))
try:
    of_the_first.observe(mine)
    states.append(of_the_first.mean.item())
except ValueError as error:
    states.append(str(error))
if child:
    os.waitpid(child, 0)
print(json.dumps(states), flush=True)
"""


def test_ranks_have_one_state_or_one_each(tmp_path):
    job = [sys.executable, "-c", TWO_RANKS, str(tmp_path / "meet")]
    said = subprocess.run(job, stdout=subprocess.PIPE, text=True, timeout=120, check=True).stdout
    ranks = [json.loads(line) for line in said.splitlines()[::-1]]  # the first waits for the second
    together = tracker_of([1.0, 2, 4, 5, 0, 2, 7], [6.0])
    inside, outside = (each.pop() for each in ranks)
    assert inside == 3 and outside.startswith("process_group does not hold rank 1, which calls; accepted is a group")
    for shared, of_group, _ in ranks:
        assert shared == of_group == ranks[0][0]
        assert shared == pytest.approx([together.mean.item(), together.variance.item()], rel=1e-14)
    alone = tracker_of([1.0, 2, 4, 5]), tracker_of([0.0, 2, 7], [6.0])
    assert [each for *_, each in ranks] == [[tracker.mean.item(), tracker.variance.item()] for tracker in alone]


# ---------------------------------------------------------------------------------------------------------------------
# The advantages


def test_advantages_by_hand():
    """Against mean 3 and deviation 2: on both sides of it, all above, all equal and above, a lone success."""
    rewards = torch.tensor([1.0, 2, 4, 5, 4, 5, 6, 9, 7, 7, 7, 7, 0, 0, 0, 20], dtype=torch.float64)
    out = af.cross_level_advantages(rewards, K, mean=3.0, variance=4.0)
    # Deviations with K - 1: sqrt(10/3), sqrt(14/3), 0, 10.
    unit, other = (10 / 3) ** 0.5, (14 / 3) ** 0.5
    local = [-2 / unit, -1 / unit, 1 / unit, 2 / unit, -2 / other, -1 / other, 0, 3 / other, *[0] * 4, *[-0.5] * 3, 1.5]
    calibrated = [-2 / 3, -1 / 3, 1 / 3, 2 / 3, -1, -0.5, 0, 1.5, *[0] * 4, *[-1 / 3] * 3, 1]
    torch.testing.assert_close(out.local, torch.tensor(local, dtype=torch.float64), rtol=2e-8, atol=0)
    torch.testing.assert_close(out.calibrated, torch.tensor(calibrated, dtype=torch.float64), rtol=2e-8, atol=0)
    assert torch.equal(out.advantages, out.local + out.calibrated)
    assert out.two_sided.tolist() == [True, False, False, True]
    clipped = af.cross_level_advantages(rewards, K, mean=3.0, variance=4.0, clip=0.6)
    assert torch.equal(clipped.calibrated, out.calibrated.clamp(-0.6, 0.6))
    assert torch.equal(clipped.local, out.local.clamp(-0.6, 0.6))


def test_a_reward_at_the_mean_is_on_no_side():
    out = af.cross_level_advantages(torch.tensor([3.0, 1, 4, 4]), K, mean=3.0, variance=4.0)
    torch.testing.assert_close(out.calibrated, torch.tensor([0.0, -1, 0.5, 0.5]))


@given(groups, sixteenths, variances, st.floats(0, 3))
def test_both_parts_of_every_group_sum_to_zero(rewards, mean, variance, weight):
    out = af.cross_level_advantages(rewards, K, mean=mean, variance=variance, weight=weight, clip=None)
    for part in out[:3]:
        sums = part.view(-1, K).sum(1).abs()
        assert (sums <= 1e-10 * part.abs().max().clamp(min=1)).all()


@given(groups, sixteenths, variances)
def test_two_sided_groups_are_corrected_by_two_over_k_on_average(rewards, mean, variance):
    out = af.cross_level_advantages(rewards, K, mean=mean, variance=variance)
    below, above = (rewards < mean).view(-1, K), (rewards > mean).view(-1, K)
    assert torch.equal(out.two_sided, below.any(1) & above.any(1))
    calibrated = out.calibrated.view(-1, K)
    sizes = calibrated.abs().mean(1)[out.two_sided]
    torch.testing.assert_close(sizes, torch.full_like(sizes, 2 / K), rtol=1e-12, atol=0)
    lone = out.two_sided[:, None] & above & (above.sum(1, keepdim=True) == 1)
    assert (calibrated[lone] == 1).all()


@given(groups, sixteenths, variances)
def test_one_sided_groups_are_rescaled_alone(rewards, mean, variance):
    out = af.cross_level_advantages(rewards, K, mean=mean, variance=variance, clip=None)
    deviation = rewards.view(-1, K).std(1).repeat_interleave(K) + 1e-8
    rescaled = out.local * deviation / (variance**0.5 + 1e-8)
    one_sided = ~out.two_sided.repeat_interleave(K)
    torch.testing.assert_close(out.calibrated[one_sided], rescaled[one_sided], rtol=1e-9, atol=1e-9)


@given(groups, sixteenths, variances)
def test_without_a_weight_they_are_the_groups_own(rewards, mean, variance):
    out = af.cross_level_advantages(rewards, K, mean=mean, variance=variance, weight=0.0)
    own = af.group_advantages(rewards, K, norm="group_std", clip=5.0, eps=1e-8, ddof=1)
    assert torch.equal(out.advantages, own) and torch.equal(out.local, own)


@given(groups, st.lists(sixteenths, min_size=2, max_size=8), sixteenths, st.sampled_from([0.25, 2.0, 32.0]))
def test_another_unit_of_the_reward_changes_nothing(rewards, scores, shift, scale):
    """The state with it. Powers of two and sums of sixteenths are exact."""
    tracker, other = tracker_of(scores), tracker_of([scale * score + shift for score in scores])
    if tracker.variance < 1e-3:  # its floor decides there
        return
    out = af.cross_level_advantages(rewards, K, mean=tracker.mean, variance=tracker.variance)
    its = af.cross_level_advantages(scale * rewards + shift, K, mean=other.mean, variance=other.variance)
    for ours, theirs in zip(out[:3], its[:3], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert torch.equal(out.two_sided, its.two_sided)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_reward_that_is_not_finite_is_left_out(bad):
    out = af.cross_level_advantages(torch.tensor([1.0, bad, 2, 6, bad, bad, bad, bad]), K, mean=3.0, variance=4.0)
    kept = af.cross_level_advantages(torch.tensor([1.0, 2, 6]), 3, mean=3.0, variance=4.0)
    for part, of_kept in zip(out[:3], kept[:3], strict=True):
        torch.testing.assert_close(part[[0, 2, 3]], of_kept)
        assert part[1] == 0 and not part[4:].any()
    assert out.two_sided.tolist() == [True, False]


@pytest.mark.parametrize(
    "bad",
    [
        {"mean": NAN}, {"mean": INF}, {"mean": -INF}, {"variance": NAN}, {"variance": INF}, {"variance": -1.0},
        {"weight": NAN}, {"weight": INF}, {"weight": -2.0},
    ],
    ids=str,
)  # fmt: skip
def test_what_nobody_waits_for_leaves_the_groups_own_where_it_has_no_meaning(monkeypatch, bad):
    monkeypatch.setattr(numbers, "values_are_at_hand", lambda tensor: False)
    given = {"mean": 3.0, "variance": 4.0, "weight": 2.0}
    rewards = torch.tensor([1.0, 2, 4, 5, 4, 5, 6, 9])
    read = af.cross_level_advantages(rewards, K, **given)
    unread = af.cross_level_advantages(rewards, K, **{name: torch.tensor(value) for name, value in given.items()})
    assert all(torch.equal(ours, same) for ours, same in zip(unread, read, strict=True))
    out = af.cross_level_advantages(rewards, K, **{name: torch.tensor(value) for name, value in (given | bad).items()})
    assert not out.calibrated.any() and not out.two_sided.any()
    assert torch.equal(out.advantages, read.local) and torch.equal(out.local, read.local)


def test_rewards_near_the_largest_number_do_not_overflow():
    most = torch.finfo(torch.float64).max
    rewards = torch.tensor([most, -most, most, -most], dtype=torch.float64)
    out = af.cross_level_advantages(rewards, K, mean=0.0, variance=1.0)
    torch.testing.assert_close(out.calibrated, torch.tensor([0.5, -0.5, 0.5, -0.5], dtype=torch.float64))
    assert af.cross_level_advantages(rewards, K, mean=-most, variance=1.0).advantages.isfinite().all()


def test_dtypes_empty_batch_and_graph():
    options = {"mean": 0.5, "variance": 0.1}
    for rewards in (torch.tensor([1, 0]), torch.tensor([True, False]), torch.tensor([1.0, 0.0]).bfloat16()):
        out = af.cross_level_advantages(rewards, 2, **options)
        assert [part.dtype for part in out] == [torch.float32] * 3 + [torch.bool]
        torch.testing.assert_close(out.calibrated, torch.tensor([1.0, -1.0]))
    wide = torch.ones(2, dtype=torch.float64, requires_grad=True)
    out = af.cross_level_advantages(wide, 2, **options)
    assert out.advantages.dtype == torch.float64 and not out.advantages.requires_grad
    empty = af.cross_level_advantages(torch.empty(0), K, **options)
    assert [part.shape for part in empty] == [(0,)] * 4


def test_it_is_traced_once_whatever_the_state():
    torch._dynamo.reset()
    counters.clear()
    rewards = torch.randn(8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    compiled = torch.compile(af.cross_level_advantages, fullgraph=True, backend="aot_eager")
    for mean in (0.0, 0.3, -4.0):
        options = {"mean": torch.tensor(mean, dtype=torch.float64), "variance": torch.tensor(1.5 + mean**2)}
        for ours, theirs in zip(
            compiled(rewards, K, **options), af.cross_level_advantages(rewards, K, **options), strict=True
        ):
            torch.testing.assert_close(ours, theirs)
    assert counters["stats"]["unique_graphs"] == 1
    with FakeTensorMode():
        out = af.cross_level_advantages(torch.empty(8), K, mean=0.0, variance=1.0)
        assert [part.shape for part in out] == [(8,), (8,), (8,), (2,)]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"group_size": 3}, r"rewards has shape \[8\].*multiple of group_size 3"),
        ({"group_size": 1}, r"group_size is 1; accepted is an integer of at least 2"),
        ({"rewards": [1.0, 2.0]}, r"rewards is list; accepted"),
        ({"mean": None}, r"mean is None; accepted is a finite number"),
        ({"mean": af.CapabilityTracker().mean}, r"mean is nan; accepted is a finite number"),
        ({"variance": -1.0}, r"variance is -1.0; accepted is a finite number of at least 0"),
        ({"variance": torch.ones(2)}, r"variance has shape \[2\]; accepted are a number of at least 0"),
        ({"weight": -1.0}, r"weight is -1.0; accepted is a finite number of at least 0"),
        ({"clip": 0.0}, r"clip is 0.0; accepted is a finite number above 0"),
    ],
)
def test_misuse_is_said_in_a_sentence(options, sentence):
    arguments = {"rewards": torch.zeros(8), "group_size": K, "mean": 0.0, "variance": 1.0} | options
    with pytest.raises(ValueError, match=sentence):
        af.cross_level_advantages(**arguments)
