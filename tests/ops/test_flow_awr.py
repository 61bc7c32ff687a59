"""FlowAWR's own algebra: its released formula, and AdvantageFlow(1-A) of the same weighting."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import advflow_ext as af
from advflow_ext.testing import assert_close_to_truth
from advflow_ext.testing.strategies import Batch
from tests.ops.forward_family import draw
from tests.ops.helpers import value_and_grad

NAME = "flow_awr_loss"
WEIGHTINGS = ("adaptive", "prediction", "velocity")
BOTH = {"native": af, "reference": af.reference}
pytestmark = pytest.mark.parametrize("side", BOTH.values(), ids=BOTH)
every_weighting = pytest.mark.parametrize("weighting", WEIGHTINGS)

seeds = st.integers(0, 1000)


def exact(seed, **options):
    batch = draw(NAME, options, 3, (4, 6), torch.float64, seed=seed)
    batch.advantages.mul_(4).add_(3)  # -1 to 7, the range for K = 8
    return batch


def factor(batch, weighting):
    """m, from the definition."""
    u, t = batch.noise - batch.x0, batch.t.double()
    w = (t * (batch.v.detach() - u).abs().mean((1, 2))).clamp(min=1e-5)
    return {"adaptive": t**2 / w, "prediction": t**2, "velocity": torch.ones_like(t)}[weighting]


@given(seeds, st.floats(0, 1))
def test_default_is_the_released_code(side, seed, kl):
    """Residuals of x0-predictions over their own mean absolute error; the reference in velocity space, unweighted."""
    batch = exact(seed, kl_weight=kl)
    x0, t, E = batch.x0, batch.t.double().view(-1, 1, 1), batch.advantages.double().view(-1, 1, 1)
    v = batch.v.detach().requires_grad_()
    x_t = (1 - t) * x0 + t * batch.noise
    prediction, old = x_t - t * v, x_t - t * batch.options["v_old"]
    w = (prediction.detach() - x0).abs().mean((1, 2), keepdim=True).clip(min=1e-5)
    policy = ((prediction - (old + E * (x0 - old))) ** 2 / w).mean((1, 2))
    loss = policy.mean() + kl * ((v - batch.options["v_ref"]) ** 2).mean()
    (expected,) = torch.autograd.grad(loss, v)
    out, grad = value_and_grad(batch, side.flow_awr_loss)
    torch.testing.assert_close(out.loss, loss.detach(), rtol=1e-10, atol=1e-12)
    assert_close_to_truth(grad, expected, 1e-12)
    torch.testing.assert_close(out.metrics.as_dict()["policy_term"], policy.mean().item(), rtol=1e-10, atol=1e-12)


@every_weighting
@given(seed=seeds)
def test_it_is_advantage_flow_one_minus_a_of_the_same_weighting(side, weighting, seed):
    batch = exact(seed, weighting=weighting, reduction="none")
    options = {"v_old": batch.options["v_old"], "gamma": "1-A", "lam": 0.0} | {
        name: batch.options[name] for name in ("weighting", "reduction")
    }
    out, grad = value_and_grad(batch, side.flow_awr_loss)
    other, other_grad = value_and_grad(Batch(*batch.arguments(), options), side.advantage_flow_loss)
    assert_close_to_truth(grad, other_grad, 1e-12)
    # The values differ by a term without gradient.
    A, E = batch.advantages.double(), (batch.options["v_old"] - batch.noise + batch.x0).square().mean((1, 2))
    constant = factor(batch, weighting) * A * (1 - A) * E
    torch.testing.assert_close(out.loss, other.loss - constant, rtol=1e-10, atol=1e-12)


@given(seeds, st.floats(0, 1))
def test_reference_term_is_that_of_advantage_flow_in_velocity_space(side, seed, kl):
    batch = exact(seed, kl_weight=kl, weighting="velocity", reduction="none")
    options = {name: batch.options[name] for name in ("v_old", "v_ref", "weighting", "reduction")}
    _, grad = value_and_grad(batch, side.flow_awr_loss)
    other = Batch(*batch.arguments(), options | {"gamma": "1-A", "lam": kl})
    assert_close_to_truth(grad, value_and_grad(other, side.advantage_flow_loss)[1], 1e-12)


@every_weighting
@given(seed=seeds)
def test_loss_and_gradient_vanish_at_the_moved_target(side, weighting, seed):
    batch = exact(seed, weighting=weighting, reduction="none", v_ref=None)
    o, u = batch.options["v_old"], batch.noise - batch.x0
    target = o + batch.advantages.double().view(-1, 1, 1) * (u - o)
    out, grad = value_and_grad(
        Batch(target.requires_grad_(), *batch.arguments()[1:], batch.options), side.flow_awr_loss
    )
    assert out.loss.abs().max() <= 1e-12 and grad.abs().max() <= 1e-13


@every_weighting
@pytest.mark.parametrize(("advantage", "anchor"), [(1.0, "u"), (0.0, "v_old")])
def test_advantages_one_and_zero(side, weighting, advantage, anchor):
    """A = 1 is flow matching on the sample, A = 0 distils the rollout policy."""
    batch = exact(0, weighting=weighting, reduction="sum", v_ref=None)
    batch.advantages.fill_(advantage)
    target = batch.noise - batch.x0 if anchor == "u" else batch.options["v_old"]
    expected = 2 / 24 * factor(batch, weighting).view(-1, 1, 1) * (batch.v.detach() - target)
    assert_close_to_truth(value_and_grad(batch, side.flow_awr_loss)[1], expected, 1e-13)


@every_weighting
def test_curvature_does_not_depend_on_the_advantage(side, weighting, recwarn):
    batch = exact(0, kl_weight=0.25, weighting=weighting)
    batch.advantages.copy_(torch.tensor([-1.0, 3.0, 23.0]))
    numbers = side.flow_awr_loss(*batch.arguments(), **batch.options).metrics.as_dict()
    assert numbers["min_curvature"] == pytest.approx(float(factor(batch, weighting).min()) + 0.25, rel=1e-12)
    assert numbers["nonconvex_samples"] == 0 and not recwarn.list


def test_a_sample_that_is_all_right_already_keeps_a_finite_scale(side):
    """v = u: the error is 0, so the floor of the scale decides."""
    batch = exact(0, reduction="none", v_ref=None)
    u = (batch.noise - batch.x0).requires_grad_()
    _, grad = value_and_grad(Batch(u, *batch.arguments()[1:], batch.options), side.flow_awr_loss)
    m = batch.t.double().square() / 1e-5
    pull = (1 - batch.advantages.double()).view(-1, 1, 1) * (u.detach() - batch.options["v_old"])
    assert_close_to_truth(grad, 2 / 24 * m.view(-1, 1, 1) * pull, 1e-9)
