"""What every forward-process loss promises: exactness, independence, bad samples, autograd, compile, sentences."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from advflow_ext.testing import ACCUMULATED_ERROR, UNIT_ROUNDOFF, assert_close_to_truth, assert_rounded_once
from advflow_ext.testing.layouts import arrange
from advflow_ext.testing.strategies import Batch, batches
from tests.ops.forward_family import (
    ANCHOR,
    BOTH,
    NAMES,
    NATIVE,
    REFERENCE,
    closed_form,
    draw,
    every_variant,
    truth,
)
from tests.ops.helpers import select, value_and_grad

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore:.*unbounded below:UserWarning"),
]

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def assert_matches_truth(name: str, batch: Batch) -> None:
    """Errors are measured against the magnitude of what is added up: terms of opposite sign may cancel."""
    out, grad = value_and_grad(batch, NATIVE[name])
    expected, expected_grad = truth(name, batch)
    form = closed_form(name, batch)
    accumulated = ACCUMULATED_ERROR[torch.float64 if batch.v.dtype == torch.float64 else torch.float32]
    count = {"none": 1, "sum": 1, "mean": len(batch.t)}[batch.options.get("reduction", "mean")]
    size = form.value_size if out.loss.dim() else form.value_size.sum() / count
    assert ((out.loss.double() - expected.loss).abs() <= accumulated * size).all()

    assert grad.dtype == batch.v.dtype and grad.shape == batch.v.shape
    rounding = UNIT_ROUNDOFF[grad.dtype] * 1.001 * expected_grad.abs() + torch.finfo(grad.dtype).tiny
    excess = (grad.double() - expected_grad).abs() - rounding
    allowed = accumulated * form.grad_size.flatten(1).norm(dim=1) / count
    assert (excess.clamp(min=0).flatten(1).norm(dim=1) <= allowed).all()


# ---------------------------------------------------------------------------------------------------------------------
# Exactness


@pytest.mark.parametrize("name", NAMES)
@given(st.data())
@settings(max_examples=100)
def test_any_batch_matches_the_truth(name, data):
    assert_matches_truth(name, data.draw(batches(loss=name)))


@pytest.mark.parametrize("name", NAMES)
@given(st.data())
@settings(max_examples=30)
def test_any_float64_batch_matches_the_truth(name, data):
    batch = data.draw(batches(dtypes=(torch.float64,), loss=name))
    out, grad = value_and_grad(batch, NATIVE[name])
    expected, expected_grad = value_and_grad(batch, REFERENCE[name])
    form = closed_form(name, batch)
    assert ((out.loss - expected.loss).abs() <= 1e-12 * form.value_size.sum()).all()
    assert (grad - expected_grad).norm() <= 1e-12 * form.grad_size.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
@given(st.data())
@settings(max_examples=100)
def test_any_cuda_batch_matches_the_truth(name, data):
    assert_matches_truth(name, data.draw(batches(device="cuda", loss=name)))


@every_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_512_pixel_latent_is_exact_to_one_in_a_million(name, options, dtype, device):
    others = draw(name, options, 4, (16, 64, 64), dtype, device, reduction="none")
    # v keeps the low-precision numbers in float32, so the gradient is seen before its rounding.
    batch = Batch(others.v.detach().float().requires_grad_(), *others.arguments()[1:], others.options)
    out, grad = value_and_grad(batch, NATIVE[name])
    expected, expected_grad = truth(name, batch)
    assert_close_to_truth(out.loss, expected.loss, 1e-6)
    for row, expected_row in zip(grad, expected_grad, strict=True):
        assert_close_to_truth(row, expected_row, 1e-6)


@every_variant
def test_autograd_of_the_published_form_is_the_three_term_gradient(name, options, device):
    batch = draw(name, options, 6, (3, 5), torch.float64, reduction="sum")
    out, grad = value_and_grad(batch, REFERENCE[name])
    form = closed_form(name, batch)
    assert_close_to_truth(grad, form.grad, 1e-13)
    assert_close_to_truth(out.loss, form.value.sum(), 1e-13)
    curvature = form.coef[:, :3].sum(1).min()
    assert out.metrics.as_dict()["min_curvature"] == pytest.approx(float(curvature), rel=1e-12)


@every_variant
def test_native_and_reference_report_the_same_metrics(name, options, device):
    batch = draw(name, options, device=device)
    native, reference = (losses[name](*batch.arguments(), **batch.options).metrics for losses in BOTH.values())
    assert native.names == reference.names and native.values.shape == (len(native.names),)
    torch.testing.assert_close(native.values, reference.values, rtol=1e-5, atol=1e-6)


def test_metrics_say_what_happened(device):
    for name in NAMES:
        batch = draw(name, {}, 4, (6,), device=device, reduction="none")
        out = NATIVE[name](*batch.arguments(), **batch.options)
        numbers = out.metrics.as_dict()
        v, u, A = batch.v.detach(), batch.noise - batch.x0, batch.advantages
        reference = (v - batch.options["v_ref"]).square().mean()
        anchor = batch.options.get(ANCHOR.get(name, "v_old"))
        kl = {"diffusion_nft_loss": 1e-4, "awm_loss": 0.0, "flow_awr_loss": 0.0, "reward_weighted_loss": 1.0}[name]
        rollout = 0.0 if anchor is None else (v - anchor).square().mean()
        pulls = kl * reference + (rollout if name == "awm_loss" else 0.0)
        expected = {
            "loss": out.loss.detach().mean(),
            "policy_term": out.loss.detach().mean() - pulls,
            "target_error": (v - u).square().mean(),
            "rollout_deviation": rollout,
            "reference_deviation": reference,
            "mean_advantage": A.mean(),
            "mean_abs_advantage": A.abs().mean(),
            "nonfinite_samples": 0,
            "invalid_timesteps": 0,
        }
        for metric, value in expected.items():
            assert numbers[metric] == pytest.approx(float(value), rel=1e-5, abs=1e-6), (name, metric)


# ---------------------------------------------------------------------------------------------------------------------
# Independence: of the batch, of layout, of repeats


@every_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sample_does_not_see_its_batch(name, options, dtype, device):
    # 38 samples fill vector registers, whose remainders PyTorch computes by other code. A group stays whole.
    batch = draw(name, options, 38, (3, 7), dtype, device, reduction="none")
    out, grad = value_and_grad(batch, NATIVE[name])
    generator = torch.Generator().manual_seed(1)
    order = (2 * torch.randperm(19, generator=generator)[:, None] + torch.arange(2)).flatten().to(device)
    shuffled, shuffled_grad = value_and_grad(select(batch, order), NATIVE[name])
    assert torch.equal(shuffled.loss, out.loss[order]) and torch.equal(shuffled_grad, grad[order])
    for rows in (slice(0, 2), slice(16, 18), slice(36, 38), slice(4, 20)):
        alone, alone_grad = value_and_grad(select(batch, rows), NATIVE[name])
        assert torch.equal(alone.loss, out.loss[rows]) and torch.equal(alone_grad, grad[rows])


@every_variant
def test_accumulated_microbatches_are_the_batch(name, options, device):
    batch = draw(name, options, 6, (4, 9), device=device, reduction="sum")
    whole = value_and_grad(batch, NATIVE[name])[1]
    parts = [value_and_grad(select(batch, slice(k, k + 2)), NATIVE[name])[1] for k in (0, 2, 4)]
    assert torch.equal(torch.cat(parts), whole)


@every_variant
@pytest.mark.parametrize("layout", ["transposed", "sliced", "offset", "channels_last"])
def test_layout_does_not_change_a_bit(name, options, layout, device):
    batch = draw(name, options, 4, (3, 5, 7), device=device, reduction="none")
    out, grad = value_and_grad(batch, NATIVE[name])
    moved = {k: arrange(x, layout) if k.startswith("v_") else x for k, x in batch.options.items()}
    v, x0, noise = (arrange(x.detach(), layout) for x in batch.arguments()[:3])
    moved_out, moved_grad = value_and_grad(
        Batch(v.requires_grad_(), x0, noise, batch.t, batch.advantages, moved), NATIVE[name]
    )
    assert torch.equal(out.loss, moved_out.loss) and torch.equal(grad, moved_grad)


# ---------------------------------------------------------------------------------------------------------------------
# Edge cases of the methods, for all of them


@every_variant
def test_zero_advantages_leave_the_anchors(name, options, device):
    if name == "reward_weighted_loss":
        pytest.skip("a reward of 0 is no absent signal there")
    batch = draw(name, options, 4, (3, 5), device=device, reduction="none")
    batch.advantages.zero_()
    assert_matches_truth(name, batch)
    scaled = {
        "diffusion_nft_loss": options.get("adaptive", True),
        "flow_awr_loss": options.get("weighting", "adaptive") == "adaptive",
    }
    if not scaled.get(name, False):  # the scales are distances from the target
        other = select(batch, slice(None))
        other.x0.normal_()
        assert torch.equal(value_and_grad(batch, NATIVE[name])[1], value_and_grad(other, NATIVE[name])[1])


@every_variant
@pytest.mark.parametrize("t", [1.0, 8.9e-3])
def test_both_ends_of_time(name, options, t, device):
    batch = draw(name, options, 4, (3, 5), device=device, reduction="none")
    batch.t.fill_(t)
    assert_matches_truth(name, batch)


@every_variant
def test_on_policy_first_step(name, options, device):
    anchor = ANCHOR.get(name, "v_old")
    if anchor is None:
        pytest.skip("no rollout policy in this loss")
    batch = draw(name, options, 4, (3, 5), device=device, reduction="none")
    batch.options[anchor] = batch.v.detach().clone()
    out, _ = value_and_grad(batch, NATIVE[name])
    assert out.metrics.as_dict()["rollout_deviation"] == 0
    assert_matches_truth(name, batch)


@every_variant
def test_policy_that_hits_its_target(name, options, device):
    batch = draw(name, options, 4, (3, 5), device=device, reduction="none")
    with torch.no_grad():
        for latent in (batch.x0, batch.noise):  # few digits, so that their difference is exact
            latent.copy_((64 * latent).round() / 64)
        batch.v.copy_(batch.noise - batch.x0)
    assert value_and_grad(batch, NATIVE[name])[0].metrics.as_dict()["target_error"] == 0
    assert_matches_truth(name, batch)


@every_variant
def test_optional_tensors_may_be_absent(name, options, device):
    batch = draw(name, options, 4, (3, 5), device=device, reduction="none")
    for absent in ("v_ref", "v_ema", "log_prob_old"):
        if absent in batch.options:
            batch.options[absent] = None
            if absent == "v_ref" and name in ("awm_loss", "flow_awr_loss"):
                batch.options.pop("kl_weight", None)
            assert_matches_truth(name, batch)


@pytest.mark.parametrize("name", NAMES)
def test_more_than_2_to_the_24_elements(name):
    generator = torch.Generator().manual_seed(0)
    few = torch.randn(5, 4099, generator=generator)
    # Tiled numbers: the truth of the long sample is that of the short one.
    v, x0, noise, o, p = (row.bfloat16().repeat(4097).view(1, -1) for row in few)
    assert v.numel() > 2**24
    anchor = ANCHOR.get(name, "v_old")
    options = {"v_ref": p, "reduction": "none", **({anchor: o} if anchor else {})}
    long = Batch(v.requires_grad_(), x0, noise, torch.tensor([0.7]), torch.tensor([0.3]), options)

    def shorten(x):
        return x.detach()[:, :4099].clone() if isinstance(x, torch.Tensor) else x

    v, x0, noise = (shorten(x) for x in long.arguments()[:3])
    short = Batch(v.requires_grad_(), x0, noise, long.t, long.advantages, {k: shorten(x) for k, x in options.items()})
    expected, expected_grad = truth(name, short)
    out, grad = value_and_grad(long, NATIVE[name])
    assert_close_to_truth(out.loss, expected.loss, 1e-6)
    assert_rounded_once(grad[:, :4099] * 4096, expected_grad * 4096 / 4097)
