"""FlowAWR's own algebra: regression on a moved target, AdvantageFlow(1-A) in velocity space."""

from __future__ import annotations

import pytest
import torch
from forward_family import draw
from helpers import value_and_grad
from hypothesis import given
from hypothesis import strategies as st

import advflow_ext as af
from advflow_ext.testing import assert_close_to_truth
from advflow_ext.testing.strategies import Batch

NAME = "flow_awr_loss"
BOTH = {"native": af, "reference": af.reference}
pytestmark = pytest.mark.parametrize("side", BOTH.values(), ids=BOTH)

seeds = st.integers(0, 1000)


def exact(seed, **options):
    batch = draw(NAME, options, 3, (4, 6), torch.float64, seed=seed)
    batch.advantages.mul_(4).add_(3)  # -1 to 7, the range for K = 8
    return batch


@given(seeds, st.floats(0, 1))
def test_it_is_advantage_flow_one_minus_a_in_velocity_space(side, seed, kl):
    batch = exact(seed, kl_weight=kl, reduction="none")
    options = {name: batch.options[name] for name in ("v_old", "v_ref")}
    options |= {"gamma": "1-A", "lam": kl, "weighting": "velocity", "reduction": "none"}
    out, grad = value_and_grad(batch, side.flow_awr_loss)
    other, other_grad = value_and_grad(Batch(*batch.arguments(), options), side.advantage_flow_loss)
    assert_close_to_truth(grad, other_grad, 1e-12)
    # The values differ by a term without gradient.
    A, E = batch.advantages.double(), (batch.options["v_old"] - batch.noise + batch.x0).square().mean((1, 2))
    torch.testing.assert_close(out.loss, other.loss - A * (1 - A) * E, rtol=1e-10, atol=1e-12)


@given(seeds)
def test_loss_and_gradient_vanish_at_the_moved_target(side, seed):
    batch = exact(seed, reduction="none", v_ref=None)
    o, u = batch.options["v_old"], batch.noise - batch.x0
    target = o + batch.advantages.double().view(-1, 1, 1) * (u - o)
    out, grad = value_and_grad(
        Batch(target.requires_grad_(), *batch.arguments()[1:], batch.options), side.flow_awr_loss
    )
    assert out.loss.abs().max() <= 1e-12 and grad.abs().max() <= 1e-13


@pytest.mark.parametrize(("advantage", "anchor"), [(1.0, "u"), (0.0, "v_old")])
def test_advantages_one_and_zero(side, advantage, anchor):
    """A = 1 is flow matching on the sample, A = 0 distils the rollout policy."""
    batch = exact(0, reduction="sum", v_ref=None)
    batch.advantages.fill_(advantage)
    target = batch.noise - batch.x0 if anchor == "u" else batch.options["v_old"]
    assert_close_to_truth(value_and_grad(batch, side.flow_awr_loss)[1], 2 / 24 * (batch.v.detach() - target), 1e-14)


def test_curvature_is_one_whatever_the_advantage(side, recwarn):
    batch = exact(0, kl_weight=0.25)
    batch.advantages.copy_(torch.tensor([-1.0, 3.0, 23.0]))
    numbers = side.flow_awr_loss(*batch.arguments(), **batch.options).metrics.as_dict()
    assert numbers["min_curvature"] == 1.25 and numbers["nonconvex_samples"] == 0 and not recwarn.list
