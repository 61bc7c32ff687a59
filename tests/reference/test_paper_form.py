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


def with_gradient(loss, v):
    v = v.detach().clone().requires_grad_()
    value = loss(v)
    return value.detach(), torch.autograd.grad(value, v)[0]


@pytest.mark.parametrize("beta", [1.0, 0.1])
@pytest.mark.parametrize("mode", ["all", "positive", "negative", "one", "binary"])
def test_diffusion_nft_is_the_released_block(beta, mode):
    """NVlabs/DiffusionNFT, train_nft_sd3.py: from the clipped advantages to the total loss, on [B, C, H, W]."""
    v, x0, noise, t, A, o, p = draw()
    A = 6 * A
    time, kl, clip = t.view(-1, 1, 1, 1), 0.01, 5.0

    def released(forward_prediction):
        xt = (1 - time) * x0 + time * noise
        advantages_clip = torch.clamp(A, -clip, clip)
        if mode == "positive":
            advantages_clip = torch.clamp(advantages_clip, 0, clip)
        elif mode == "negative":
            advantages_clip = torch.clamp(advantages_clip, -clip, 0)
        elif mode == "one":
            advantages_clip = torch.where(
                advantages_clip > 0, torch.ones_like(advantages_clip), torch.zeros_like(advantages_clip)
            )
        elif mode == "binary":
            advantages_clip = torch.sign(advantages_clip)
        r = torch.clamp((advantages_clip / clip) / 2.0 + 0.5, 0, 1)
        losses = []
        for prediction in (
            beta * forward_prediction + (1 - beta) * o,
            (1.0 + beta) * o - beta * forward_prediction,
        ):
            x0_prediction = xt - time * prediction
            with torch.no_grad():
                weight_factor = torch.abs(x0_prediction - x0).mean(dim=(1, 2, 3), keepdim=True).clip(min=0.00001)
            losses.append(((x0_prediction - x0) ** 2 / weight_factor).mean(dim=(1, 2, 3)))
        policy_loss = ((r * losses[0] / beta + (1.0 - r) * losses[1] / beta) * clip).mean()
        return policy_loss + kl * ((forward_prediction - p) ** 2).mean(dim=(1, 2, 3)).mean()

    def ours(velocity):
        return af.reference.diffusion_nft_loss(
            velocity, x0, noise, t, A, v_old=o, v_ref=p, beta=beta, kl_weight=kl, mode=mode
        ).loss

    for actual, expected in zip(with_gradient(ours, v), with_gradient(released, v), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("clip", [1.0, 0.2])
@pytest.mark.parametrize("off_policy", [False, True])
@pytest.mark.parametrize("weighting", ["uniform", "t", "t2", "huber", "ghuber"])
def test_awm_is_the_released_block(weighting, off_policy, clip):
    """scxue/advantage_weighted_matching, train_sd3_awm.py: compute_log_prob_awm and the GRPO block, "exp_first"."""
    v, x0, noise, t, A, ema, p = draw(batch=6)
    power = 0.25

    def log_prob_awm(model_output):
        log_prob = (-((model_output - (noise - x0)) ** 2)).mean(dim=(1, 2, 3))
        if weighting == "t":
            log_prob = log_prob * t
        elif weighting == "t2":
            log_prob = log_prob * t**2
        elif weighting == "huber":
            log_prob = -(torch.sqrt(-log_prob + 1e-10) - 1e-5) * t
        elif weighting == "ghuber":
            log_prob = -(torch.pow(-log_prob + 1e-10, power) - 1e-10**power) * t / power
        return log_prob

    stored = log_prob_awm(v) + torch.linspace(-0.8, 0.8, 6) if off_policy else None

    def released(model_output):
        log_prob = log_prob_awm(model_output)
        ratio = torch.exp(log_prob - (log_prob.detach() if stored is None else stored))
        unclipped_loss = -A * ratio
        clipped_loss = -A * torch.clamp(ratio, 1.0 - clip, 1.0 + clip)
        policy_loss = torch.mean(torch.maximum(unclipped_loss, clipped_loss))
        kl_loss = ((model_output - p) ** 2).mean(dim=(1, 2, 3)).mean()
        ema_kl_loss = ((model_output - ema) ** 2).mean(dim=(1, 2, 3)).mean()
        return policy_loss + 0.001 * kl_loss + 1.0 * ema_kl_loss

    def ours(velocity):
        return af.reference.awm_loss(
            velocity, x0, noise, t, A,
            v_ema=ema, v_ref=p, log_prob_old=stored, weighting=weighting, power=power, clip=clip, kl_weight=0.001,
        ).loss  # fmt: skip

    for actual, expected in zip(with_gradient(ours, v), with_gradient(released, v), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(
        af.reference.awm_log_prob(v, x0, noise, t, weighting=weighting, power=power), log_prob_awm(v)
    )


def test_orw_cfm_w2_is_the_released_loss():
    """markerthu/orw-cfm, finetune_fm.py."""
    v, x0, noise, t, R, _, p = draw()

    def released(vt):
        fm_loss = ((vt - (noise - x0)) ** 2).mean(dim=(1, 2, 3))
        w2_loss = ((vt - p) ** 2).mean(dim=(1, 2, 3))
        return torch.mean(torch.exp(0.5 * R) * fm_loss + 1.0 * w2_loss)

    def ours(velocity):
        return af.reference.reward_weighted_loss(velocity, x0, noise, t, R, v_ref=p).loss

    for actual, expected in zip(with_gradient(ours, v), with_gradient(released, v), strict=True):
        torch.testing.assert_close(actual, expected)
