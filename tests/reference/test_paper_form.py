"""The reference against the paper's own form: squared errors of x0-predictions, x_t formed explicitly."""

from __future__ import annotations

import pytest
import torch

import advflow_ext as af


def draw(batch=3, shape=(2, 3, 4), seed=0):
    generator = torch.Generator().manual_seed(seed)
    v, x0, noise, o, p = torch.randn(5, batch, *shape, generator=generator, dtype=torch.float64)
    t, A = torch.rand(2, batch, generator=generator, dtype=torch.float64)
    return v, x0, noise, 0.05 + 0.95 * t, 2 * A - 1, o, p


def test_prediction_weighting_is_eq_5_with_element_means():
    v, x0, noise, t, A, o, p = draw()
    gamma, lam = 1.1, 0.3
    time = t.view(-1, 1, 1, 1)
    x_t = (1 - time) * x0 + time * noise
    f, f_old, f_ref = (x_t - time * velocity for velocity in (v, o, p))

    def mean_square(difference):
        return difference.square().mean((1, 2, 3))

    expected = A * mean_square(f - x0) + gamma * mean_square(f - f_old) + lam * mean_square(f - f_ref)
    for reduction, value in (("none", expected), ("mean", expected.mean()), ("sum", expected.sum())):
        out = af.reference.advantage_flow_loss(
            v, x0, noise, t, A, v_old=o, v_ref=p, gamma=gamma, lam=lam, reduction=reduction
        )
        torch.testing.assert_close(out.loss, value)


def test_adaptive_weight_is_the_detached_mean_error_of_the_prediction():
    v, x0, noise, t, A, o, p = draw()
    time = t.view(-1, 1, 1, 1)
    f = (1 - time) * x0 + time * noise - time * v
    w = (f - x0).abs().mean((1, 2, 3)).clamp(min=1e-5)
    plain, adaptive = (
        af.reference.advantage_flow_loss(v, x0, noise, t, A, v_old=o, v_ref=p, weighting=weighting, reduction="none")
        for weighting in ("prediction", "adaptive")
    )
    torch.testing.assert_close(adaptive.loss, plain.loss / w)


@pytest.mark.parametrize("weighting", ["prediction", "velocity"])
@pytest.mark.parametrize("gamma", [1.1, "1-A"])
def test_gradcheck(weighting, gamma):
    v, x0, noise, t, A, o, p = draw(batch=2, shape=(3, 2))

    def loss(velocity):
        return af.reference.advantage_flow_loss(
            velocity, x0, noise, t, A, v_old=o, v_ref=p, weighting=weighting, gamma=gamma, lam=0.2
        ).loss

    assert torch.autograd.gradcheck(loss, (v.requires_grad_(),))
