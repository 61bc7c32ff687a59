"""The weights of ORW-CFM-W2, RWR and RAFT."""

from __future__ import annotations

import math

import pytest
import torch

import advflow_ext as af
from advflow_ext.testing import assert_close_to_truth
from advflow_ext.testing.strategies import Batch
from tests.ops.forward_family import draw
from tests.ops.helpers import value_and_grad

NAME = "reward_weighted_loss"
BOTH = {"native": af, "reference": af.reference}
pytestmark = pytest.mark.parametrize("side", BOTH.values(), ids=BOTH)

REWARDS = [0.5, 2.0, 2.0, -1.0, 0.25, 0.125]


def weights(side, rewards, **options):
    """What multiplies <(v-u)^2>, which is 1 here, by value and by gradient."""
    count, one = len(rewards), torch.ones(len(rewards), 1)
    v = one.clone().requires_grad_()
    out = side.reward_weighted_loss(v, 0 * one, 0 * one, one[:, 0], torch.tensor(rewards), reduction="none", **options)
    (grad,) = torch.autograd.grad(out.loss.sum(), v)
    assert torch.equal(grad, 2 * out.loss.detach().view(count, 1))
    return out.loss.tolist(), out.metrics.as_dict()


@pytest.mark.filterwarnings("ignore:.*unbounded below:UserWarning")
def test_weights_by_hand(side):
    assert weights(side, REWARDS)[0] == pytest.approx([math.exp(0.5 * R) for R in REWARDS])
    assert weights(side, REWARDS, tau=2.0)[0] == pytest.approx([math.exp(2 * R) for R in REWARDS])
    assert weights(side, REWARDS, method="linear")[0] == REWARDS
    assert weights(side, REWARDS, method="best", group_size=3)[0] == [0, 1, 1, 0, 1, 0]  # equals share
    assert weights(side, REWARDS, method="best", group_size=2)[0] == [0, 1, 1, 0, 1, 0]
    assert weights(side, REWARDS, method="best", group_size=6)[0] == [0, 1, 1, 0, 0, 0]


def test_equal_rewards_are_all_the_best(side):
    assert weights(side, [0.3] * 4, method="best", group_size=4)[0] == [1] * 4


def test_samples_without_weight_are_not_called_nonconvex(side, recwarn):
    numbers = weights(side, REWARDS, method="best", group_size=3)[1]
    assert numbers["min_curvature"] == 0 and numbers["nonconvex_samples"] == 0 and not recwarn.list


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_reward_is_never_the_best(side, bad):
    losses, numbers = weights(side, [0.5, bad, 0.25, bad, bad, bad], method="best", group_size=3)
    assert losses == [1, 0, 0, 0, 0, 0] and numbers["nonfinite_samples"] == 4


def test_a_weight_that_overflows_is_dropped_and_counted(side):
    losses, numbers = weights(side, [1.0, 200.0, 2.0])
    assert losses == pytest.approx([math.exp(0.5), 0, math.exp(1)]) and numbers["nonfinite_samples"] == 1


@pytest.mark.filterwarnings("ignore:.*unbounded below:UserWarning")
def test_linear_is_advantage_flow_without_rollout_term(side):
    batch = draw(NAME, {"method": "linear", "kl_weight": 0.3}, 3, (4, 6), torch.float64)
    options = {"v_old": batch.x0, "v_ref": batch.options["v_ref"], "gamma": 0.0, "lam": 0.3, "weighting": "velocity"}
    out, grad = value_and_grad(batch, side.reward_weighted_loss)
    other, other_grad = value_and_grad(Batch(*batch.arguments(), options), side.advantage_flow_loss)
    assert_close_to_truth(out.loss, other.loss, 1e-14)
    assert_close_to_truth(grad, other_grad, 1e-14)
