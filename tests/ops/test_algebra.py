"""What the method itself promises: minimiser, homogeneity, completed square, DiffusionNFT as a special case."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from advflow_ext.testing import assert_close_to_truth
from advflow_ext.testing.strategies import Batch
from tests.ops.helpers import BOTH, draw_batch, value_and_grad

pytestmark = pytest.mark.parametrize("loss", BOTH.values(), ids=BOTH)

seeds = st.integers(0, 1000)


def column(scalars, like):
    return scalars.view(-1, *[1] * (like.dim() - 1))


def with_v(batch, v):
    return Batch(v.detach().requires_grad_(), *batch.arguments()[1:], batch.options)


@given(seeds, st.sampled_from(["prediction", "velocity"]), st.sampled_from([1.1, "1-A"]), st.floats(0, 1))
def test_gradient_vanishes_at_the_closed_form_minimiser(loss, seed, weighting, gamma, lam):
    batch = draw_batch(3, (4, 6), torch.float64, seed=seed, weighting=weighting, gamma=gamma, lam=lam)
    A = batch.advantages.double()
    b = 1 - A if gamma == "1-A" else torch.full_like(A, gamma)
    u, o, p = batch.noise - batch.x0, batch.options["v_old"], batch.options["v_ref"]
    best = column(A, u) * u + column(b, u) * o + lam * p
    best = best / column(A + b + lam, u)
    assert value_and_grad(with_v(batch, best), loss)[1].abs().max() <= 1e-14 * best.abs().max()


@given(seeds, st.floats(0.25, 4))
def test_scaling_every_latent_scales_the_loss_squared_and_the_gradient_once(loss, seed, scale):
    batch = draw_batch(3, (4, 6), torch.float64, seed=seed)
    options = {k: x * scale if isinstance(x, torch.Tensor) else x for k, x in batch.options.items()}
    v, x0, noise, t, A = batch.arguments()
    scaled = Batch((v.detach() * scale).requires_grad_(), x0 * scale, noise * scale, t, A, options)
    out, grad = value_and_grad(batch, loss)
    scaled_out, scaled_grad = value_and_grad(scaled, loss)
    torch.testing.assert_close(scaled_out.loss, out.loss * scale**2, rtol=1e-10, atol=1e-12)
    assert_close_to_truth(scaled_grad, grad * scale, 1e-12)


@given(seeds)
def test_doubling_is_exact_in_float32(loss, seed):
    batch = draw_batch(3, (4, 6), seed=seed)
    doubled = Batch(
        (2 * batch.v).detach().requires_grad_(), 2 * batch.x0, 2 * batch.noise, batch.t, batch.advantages,
        {name: 2 * value for name, value in batch.options.items()},
    )  # fmt: skip
    out, grad = value_and_grad(batch, loss)
    doubled_out, doubled_grad = value_and_grad(doubled, loss)
    assert torch.equal(doubled_out.loss, 4 * out.loss) and torch.equal(doubled_grad, 2 * grad)


@given(seeds, st.sampled_from([1.1, "1-A"]))
def test_completed_square_has_the_same_gradient(loss, seed, gamma):
    lam = 0.3
    batch = draw_batch(3, (4, 6), torch.float64, seed=seed, gamma=gamma, lam=lam, weighting="velocity")
    A = batch.advantages.double()
    b = 1 - A if gamma == "1-A" else torch.full_like(A, gamma)
    u, o, p = batch.noise - batch.x0, batch.options["v_old"], batch.options["v_ref"]
    total = A + b + lam
    best = (column(A, u) * u + column(b, u) * o + lam * p) / column(total, u)
    v = batch.v.detach().requires_grad_()
    (expected,) = torch.autograd.grad((total * (v - best).square().mean((1, 2))).mean(), v)
    assert_close_to_truth(value_and_grad(batch, loss)[1], expected, 1e-12)


@given(seeds)
def test_gamma_one_minus_a_is_plain_diffusion_nft(loss, seed):
    """DiffusionNFT (arXiv 2509.16117), beta = 1: r |v+ - u|^2 + (1 - r) |v- - u|^2, v+- = o +- (v - o), A = 2r - 1."""
    batch = draw_batch(
        3, (4, 6), torch.float64, seed=seed, gamma="1-A", lam=0.0, weighting="velocity", reduction="none"
    )
    v = batch.v.detach().requires_grad_()
    u, o = batch.noise - batch.x0, batch.options["v_old"]
    r = (batch.advantages.double() + 1) / 2
    positive = (o + (v - o) - u).square().mean((1, 2))
    negative = (o - (v - o) - u).square().mean((1, 2))
    nft = r * positive + (1 - r) * negative
    (expected,) = torch.autograd.grad(nft.sum(), v)
    out, grad = value_and_grad(batch, loss)
    assert_close_to_truth(grad, expected, 1e-12)
    # The values differ by a term without gradient.
    constant = (1 - batch.advantages.double()) * (o - u).square().mean((1, 2))
    torch.testing.assert_close(out.loss + constant, nft, rtol=1e-10, atol=1e-12)


@given(seeds, st.floats(0.1, 5))
def test_on_policy_the_anchor_is_silent(loss, seed, gamma):
    batch = draw_batch(3, (4, 6), torch.float64, seed=seed, lam=0.0, weighting="velocity", gamma=gamma + 1)
    batch = with_v(batch, batch.options["v_old"])
    u = batch.noise - batch.x0
    expected = 2 / (24 * 3) * column(batch.advantages.double(), u) * (batch.v.detach() - u)
    assert_close_to_truth(value_and_grad(batch, loss)[1], expected, 1e-12)
