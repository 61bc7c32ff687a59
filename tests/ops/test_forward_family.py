"""What every forward-process loss promises: exactness, independence, bad samples, autograd, compile, sentences."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import advflow_ext as af
from advflow_ext import _native
from advflow_ext.testing import ACCUMULATED_ERROR, UNIT_ROUNDOFF, assert_close_to_truth, assert_rounded_once
from advflow_ext.testing.strategies import Batch, arrange, batches
from tests.ops.forward_family import ANCHOR, IDS, NAMES, NATIVE, REFERENCE, VARIANTS, closed_form, draw, truth
from tests.ops.helpers import select, value_and_grad

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
BOTH = {"native": NATIVE, "reference": REFERENCE}

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore:.*unbounded below:UserWarning"),
]
every_variant = pytest.mark.parametrize(("name", "options"), VARIANTS, ids=IDS)
both = pytest.mark.parametrize("losses", BOTH.values(), ids=BOTH)


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
# Bad samples


def bad_inputs(name, options):
    anchor = ANCHOR.get(name, "v_old")
    latents = ["v", "x0", "noise", "v_ref", *([anchor] if anchor else [])]
    scalars = ["t", "advantages", *(["log_prob_old"] if options.get("off_policy") else [])]
    values = (float("nan"), float("inf"), -float("inf"))
    yield from ((tensor, value) for tensor in latents + scalars for value in values)
    # Finite, but the square is not.
    yield from ((tensor, 3e38) for tensor in latents if tensor != "noise")


@both
@every_variant
def test_a_bad_sample_is_dropped_and_touches_no_other(losses, name, options, device):
    loss = losses[name]
    batch = draw(name, options, 4, (3, 5), device=device, reduction="none")
    clean, clean_grad = value_and_grad(batch, loss)
    others = torch.tensor([0, 2, 3], device=device)
    for tensor_name, value in bad_inputs(name, options):
        broken = select(batch, slice(None))
        tensor = broken.options[tensor_name] if tensor_name in broken.options else getattr(broken, tensor_name)
        with torch.no_grad():
            tensor[1].view(-1)[-1] = value
        out, grad = value_and_grad(broken, loss)
        case = (tensor_name, value)
        assert out.loss[1] == 0 and not grad[1].any(), case
        assert torch.equal(out.loss[others], clean.loss[others]), case
        assert torch.equal(grad[others], clean_grad[others]), case
        metrics = out.metrics.as_dict()
        assert metrics["nonfinite_samples"] == 1, case
        assert all(number == number for number in metrics.values()), case
        assert metrics["loss"] == pytest.approx(clean.loss[others].mean().item(), rel=1e-6), case


@both
@every_variant
def test_a_bad_sample_stays_in_the_denominator(losses, name, options, device):
    batch = draw(name, options, 4, (3, 5), device=device)
    clean_grad = value_and_grad(batch, losses[name])[1]
    batch.x0[1] = float("nan")
    grad = value_and_grad(batch, losses[name])[1]
    assert torch.equal(grad[[0, 2, 3]], clean_grad[[0, 2, 3]])


@both
@every_variant
@pytest.mark.parametrize("value", [0.0, -0.25, 1.0001])
def test_t_out_of_range(losses, name, options, value, device):
    batch = draw(name, options, 4, (3, 5), device=device, reduction="none")
    batch.t[2] = value
    if device == "cpu":
        with pytest.raises(ValueError, match=rf"t\[2\] is {value:.6g}; accepted is 0 < t <= 1"):
            losses[name](*batch.arguments(), **batch.options)
    else:
        out, grad = value_and_grad(batch, losses[name])
        assert out.loss[2] == 0 and not grad[2].any() and out.metrics.as_dict()["invalid_timesteps"] == 1


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


@both
@every_variant
@pytest.mark.parametrize("shape", [(0, 3, 8), (4, 0), (2, 4, 0)])
def test_empty_batch_and_empty_samples(losses, name, options, shape, device):
    for reduction in ("mean", "sum", "none"):
        batch = draw(name, options, shape[0], shape[1:], device=device, reduction=reduction)
        out, grad = value_and_grad(batch, losses[name])
        assert grad.shape == shape and out.loss.isfinite().all()
        metrics = out.metrics.as_dict()
        assert metrics["nonfinite_samples"] == 0 and metrics["target_error"] == 0
        if shape[0] == 0:
            assert not out.loss.any()


# ---------------------------------------------------------------------------------------------------------------------
# Autograd and launches


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("diffusion_nft_loss", {"adaptive": False, "beta": 0.3}),  # the adaptive scales are constants by definition
        # On-policy the value is -A whatever v is; off-policy it is the integral of the gradient.
        *[("awm_loss", {"off_policy": True, "weighting": w}) for w in ("uniform", "t", "t2", "huber", "ghuber")],
        *[("flow_awr_loss", {"kl_weight": 0.5, "weighting": w}) for w in ("prediction", "velocity")],
        ("reward_weighted_loss", {}),
    ],
)
def test_gradcheck(name, options):
    batch = draw(name, options, 2, (3, 2), torch.float64, reduction="none")
    assert torch.autograd.gradcheck(
        lambda v: NATIVE[name](v, *batch.arguments()[1:], **batch.options).loss, (batch.v,), nondet_tol=0.0
    )


@both
@every_variant
def test_gradient_flows_to_v_only(losses, name, options, device):
    batch = draw(name, options, device=device)
    leaves = [*batch.arguments()[1:], *(x for x in batch.options.values() if isinstance(x, torch.Tensor))]
    for leaf in leaves:
        leaf.requires_grad_()
    out = losses[name](*batch.arguments(), **batch.options)
    out.loss.backward()
    assert all(leaf.grad is None for leaf in leaves) and batch.v.grad is not None
    assert not out.metrics.values.requires_grad


@every_variant
def test_only_inputs_and_per_sample_numbers_are_saved(name, options, device):
    batch = draw(name, options, 4, (16, 8, 8), device=device)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        NATIVE[name](*batch.arguments(), **batch.options)
    latents = [*batch.arguments()[:3], *(x for k, x in batch.options.items() if k.startswith("v_"))]
    inputs = {x.data_ptr() for x in latents}
    assert {x.data_ptr() for x in saved} >= inputs
    assert all(x.numel() <= 4 * 3 for x in saved if x.data_ptr() not in inputs)


@every_variant
def test_forward_is_two_native_launches_and_backward_one(name, options, device):
    batch = draw(name, options, device=device)
    module = _native.module
    assert module is not None
    module.reset_launch_count()
    out = NATIVE[name](*batch.arguments(), **batch.options)
    assert module.launch_count() == 2
    out.loss.backward()
    assert module.launch_count() == 3


@every_variant
def test_without_grad_nothing_is_recorded(name, options, device):
    batch = draw(name, options, device=device)
    with torch.no_grad():
        assert not NATIVE[name](*batch.arguments(), **batch.options).loss.requires_grad


@every_variant
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_loss_may_be_changed_in_place(name, options, reduction, device):
    batch = draw(name, options, device=device)
    batch.options["reduction"] = reduction
    loss = NATIVE[name](*batch.arguments(), **batch.options).loss
    (whole,) = torch.autograd.grad(loss.sum(), batch.v)
    loss = NATIVE[name](*batch.arguments(), **batch.options).loss
    loss /= 4
    (quarter,) = torch.autograd.grad(loss.sum(), batch.v)
    assert torch.equal(quarter, whole / 4)


@every_variant
def test_loss_scale_reaches_the_gradient_before_its_rounding(name, options, device):
    batch = draw(name, options, 8, (16, 32, 32), torch.float16, device, v_ref=None)
    scale = 2.0**14
    out = NATIVE[name](*batch.arguments(), **batch.options)
    (grad,) = torch.autograd.grad(out.loss * scale, batch.v)
    assert_rounded_once(grad, truth(name, batch)[1] * scale)


@every_variant
def test_autocast_changes_nothing(name, options, device):
    batch = draw(name, options, dtype=torch.bfloat16, device=device)
    out, grad = value_and_grad(batch, NATIVE[name])
    with torch.autocast(device, torch.bfloat16):
        inside, inside_grad = value_and_grad(batch, NATIVE[name])
    assert inside.loss.dtype == torch.float32
    assert torch.equal(out.loss, inside.loss) and torch.equal(grad, inside_grad)


@both
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("diffusion_nft_loss", {}),
        ("diffusion_nft_loss", {"adaptive": False, "mode": "one"}),
        ("awm_loss", {}),
        ("awm_loss", {"off_policy": True, "weighting": "huber", "clip": 0.2}),
        ("flow_awr_loss", {}),
        ("reward_weighted_loss", {}),
        ("reward_weighted_loss", {"method": "linear"}),
        ("reward_weighted_loss", {"method": "best", "group_size": 2}),
    ],
)
def test_compiles_without_graph_breaks(losses, name, options, device):
    batch = draw(name, options, 4, (6,), device=device)
    torch._dynamo.reset()
    out, grad = value_and_grad(batch, torch.compile(losses[name], fullgraph=True, backend="aot_eager"))
    expected, expected_grad = value_and_grad(batch, losses[name])
    torch.testing.assert_close(out.loss, expected.loss)
    torch.testing.assert_close(out.metrics.values, expected.metrics.values)
    torch.testing.assert_close(grad, expected_grad)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_compiles_with_inductor(name, device):
    torch.use_deterministic_algorithms(False)
    batch = draw(name, {}, 4, (6,), device=device)
    torch._dynamo.reset()
    out, grad = value_and_grad(batch, torch.compile(NATIVE[name], fullgraph=True))
    expected, expected_grad = value_and_grad(batch, NATIVE[name])
    torch.testing.assert_close(out.loss, expected.loss)
    torch.testing.assert_close(grad, expected_grad)
    torch.use_deterministic_algorithms(True)


@pytest.mark.gpu
@every_variant
def test_a_training_step_never_waits_for_the_device(name, options):
    batch = draw(name, options, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        NATIVE[name](*batch.arguments(), **batch.options).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---------------------------------------------------------------------------------------------------------------------
# What the caller is told


def cases(name, *changes):
    return [(name, change, sentence) for change, sentence in changes]


AT_LEAST_0, ABOVE_0 = "accepted is a finite number of at least 0", "accepted is a finite number above 0"
MISUSE = [
    *cases(
        "diffusion_nft_loss",
        ({"v_old": None}, r"v_old is a NoneType; accepted is a floating-point torch.Tensor"),
        ({"v_old": torch.randn(4, 5)}, r"v_old has shape \[4, 5\]; accepted is the shape of v, \[4, 6\]"),
        ({"beta": 0.0}, rf"beta is 0.0; {ABOVE_0}"),
        ({"beta": True}, rf"beta is True; {ABOVE_0}"),
        ({"adv_clip_max": -5.0}, rf"adv_clip_max is -5.0; {ABOVE_0}"),
        ({"kl_weight": -1e-4}, rf"kl_weight is -0.0001; {AT_LEAST_0}"),
        ({"adaptive": "yes"}, r"adaptive is 'yes'; accepted are True and False"),
        ({"mode": "positive_only"}, r"mode is 'positive_only'; accepted are 'all', 'positive', 'negative', 'one', "),
    ),
    *cases(
        "awm_loss",
        ({"v_ema": torch.randn(3, 6)}, r"v_ema has shape \[3, 6\]; accepted is the shape of v, \[4, 6\]"),
        ({"log_prob_old": torch.randn(4, 1)}, r"log_prob_old has shape \[4, 1\]; accepted is one value a sample"),
        ({"log_prob_old": 0.0}, r"log_prob_old is a float; accepted"),
        ({"weighting": "Uniform"}, r"weighting is 'Uniform'; accepted are 'uniform', 't', 't2', 'huber', 'ghuber'"),
        ({"power": 0.0}, rf"power is 0.0; {ABOVE_0}"),
        ({"clip": 0.0}, rf"clip is 0.0; {ABOVE_0}"),
        ({"ema_weight": -1.0}, rf"ema_weight is -1.0; {AT_LEAST_0}"),
        ({"kl_weight": float("inf")}, rf"kl_weight is inf; {AT_LEAST_0}"),
    ),
    *cases(
        "flow_awr_loss",
        ({"v_old": None}, r"v_old is a NoneType"),
        ({"kl_weight": None}, rf"kl_weight is None; {AT_LEAST_0}"),
        ({"weighting": "t2"}, r"weighting is 't2'; accepted are 'prediction', 'velocity', 'adaptive'"),
    ),
    *cases(
        "reward_weighted_loss",
        ({"rewards": torch.rand(3)}, r"rewards has shape \[3\]; accepted is one value a sample, \[4\]"),
        ({"rewards": [1.0] * 4}, r"rewards is a list; accepted"),
        ({"method": "softmax"}, r"method is 'softmax'; accepted are 'exp', 'linear', 'best'"),
        ({"method": "best"}, r"group_size is None; accepted is an integer of at least 2"),
        (
            {"method": "best", "group_size": 3},
            r"rewards has shape \[4\]; accepted is \[L\*K\], a multiple of group_size 3",
        ),
        ({"group_size": 1}, r"group_size is 1; accepted is an integer of at least 2"),
        ({"tau": 0.0}, rf"tau is 0.0; {ABOVE_0}"),
        ({"kl_weight": -1.0}, rf"kl_weight is -1.0; {AT_LEAST_0}"),
    ),
]
for _name in NAMES:
    MISUSE += cases(
        _name,
        ({"v": torch.randn(4)}, r"v has shape \[4\]; accepted are a batch dimension and at least one more"),
        ({"x0": torch.randn(4, 5)}, r"x0 has shape \[4, 5\]; accepted is the shape of v"),
        ({"noise": torch.ones(4, 6, dtype=torch.int64)}, r"noise has dtype torch.int64; accepted are float32"),
        ({"v_ref": torch.randn(4, 6, 1)}, r"v_ref has shape \[4, 6, 1\]"),
        ({"x0": torch.randn(4, 6, device="meta")}, r"x0 is on meta; accepted is the device of v, cpu"),
        ({"t": 0.5}, r"t is a float; accepted"),
        ({"t": torch.rand(4, 1)}, r"t has shape \[4, 1\]; accepted is one value a sample, \[4\]"),
        ({"reduction": "avg"}, r"reduction is 'avg'; accepted are 'mean', 'sum', 'none'"),
    )
    if _name != "reward_weighted_loss":
        MISUSE += cases(
            _name,
            ({"advantages": torch.rand(3)}, r"advantages has shape \[3\]"),
            ({"advantages": torch.ones(4, dtype=torch.int32)}, r"advantages has dtype torch.int32"),
        )


@both
@pytest.mark.parametrize(("name", "change", "sentence"), MISUSE)
def test_misuse_is_said_in_a_sentence(losses, name, change, sentence):
    batch = draw(name, {}, 4, (6,))
    scores = "rewards" if name == "reward_weighted_loss" else "advantages"
    arguments = dict(zip(("v", "x0", "noise", "t", scores), batch.arguments(), strict=True)) | batch.options
    with pytest.raises(ValueError, match=sentence):
        losses[name](**{**arguments, **change})


@pytest.mark.skipif("cuda" not in _native.DEVICES, reason="built without CUDA kernels")
@pytest.mark.parametrize("name", [*NAMES, "awm_log_prob"])
def test_float64_on_cuda_is_refused_in_a_sentence(name):
    with torch._subclasses.FakeTensorMode():  # needs no GPU
        v, one = torch.empty(2, 3, device="cuda", dtype=torch.float64), torch.empty(2, device="cuda")
        arguments = [v, v, v, one, *([] if name == "awm_log_prob" else [one])]
        options = {"v_old": v} if name in ("diffusion_nft_loss", "flow_awr_loss") else {}
        with pytest.raises(ValueError, match=rf"a latent is float64 on CUDA; .*advflow_ext.reference.{name}\)"):
            getattr(af, name)(*arguments, **options)


@every_variant
def test_unknown_device_is_served_by_the_reference(name, options, monkeypatch):
    batch = draw(name, options)
    expected = value_and_grad(batch, REFERENCE[name])
    monkeypatch.setattr(_native, "DEVICES", frozenset())
    monkeypatch.setattr(_native, "_devices_warned_of", set())
    with pytest.warns(RuntimeWarning, match="built without cpu kernels"):
        out, grad = value_and_grad(batch, NATIVE[name])
    assert torch.equal(out.loss, expected[0].loss) and torch.equal(grad, expected[1])


@both
def test_only_losses_that_can_lose_their_minimum_warn(losses, device):
    for name in NAMES:
        batch = draw(name, {"v_ref": None}, device=device)
        batch.advantages.fill_(-1.0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            losses[name](*batch.arguments(), **batch.options).metrics.as_dict()
    batch = draw("reward_weighted_loss", {"method": "linear", "kl_weight": 0.25}, device=device)
    batch.advantages.copy_(torch.tensor([-0.5, -1.0, -0.25, 0.5]))
    with pytest.warns(UserWarning, match=r"2 sample\(s\) have reward \+ kl_weight < 0 \(smallest -0.75\)"):
        numbers = losses["reward_weighted_loss"](*batch.arguments(), **batch.options).metrics.as_dict()
    assert numbers["nonconvex_samples"] == 2 and numbers["min_curvature"] == -0.75


# ---------------------------------------------------------------------------------------------------------------------
# AdvantageFlow's beta family


@pytest.mark.parametrize("loss", [af.advantage_flow_loss, af.reference.advantage_flow_loss], ids=BOTH)
def test_advantage_flow_001_01a_weighs_as_its_name_says(loss, device):
    """The paper's "AdvantageFlow(0.01-0.1A)": data weight 0.1 A, rollout weight 0.01 - 0.1 A."""
    batch = draw("advantage_flow_loss", {"gamma": "beta(beta-A)", "beta": 0.1}, device=device)
    out, grad = value_and_grad(batch, loss)
    A = batch.advantages
    by_hand = Batch(*batch.arguments()[:4], 0.1 * A, batch.options | {"gamma": 0.01 - 0.1 * A, "beta": 1.0})
    expected, expected_grad = value_and_grad(by_hand, loss)
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-5, atol=1e-7)
    assert_close_to_truth(grad, expected_grad, 1e-6)
    numbers = out.metrics.as_dict()
    assert numbers["min_curvature"] == pytest.approx(0.01 + 1e-3, rel=1e-5) and numbers["nonconvex_samples"] == 0


@pytest.mark.parametrize("loss", [af.advantage_flow_loss, af.reference.advantage_flow_loss], ids=BOTH)
def test_beta_takes_part_in_the_curvature_check(loss, device):
    """The paper's "AdvantageFlow(0.01)" has rollout weight 0.01 and so no minimum for A < -0.1."""
    batch = draw("advantage_flow_loss", {"gamma": 0.01, "beta": 0.1, "lam": 0.0}, device=device)
    batch.advantages.copy_(torch.tensor([0.5, -0.05, -0.2, -1.0]))
    with pytest.warns(UserWarning, match=r"2 sample\(s\) have beta A \+ gamma \+ lam <= 0 \(smallest -0.09\)"):
        numbers = loss(*batch.arguments(), **batch.options).metrics.as_dict()
    assert numbers["nonconvex_samples"] == 2
    for beta in (0.0, "0.1", float("nan")):
        with pytest.raises(ValueError, match=rf"beta is {beta!r}; accepted is a finite number above 0"):
            loss(*batch.arguments(), **batch.options | {"beta": beta})
    with pytest.raises(ValueError, match=r"gamma is 'beta'; accepted are a number, .* \"1-A\" and \"beta\(beta-A\)\""):
        loss(*batch.arguments(), **batch.options | {"gamma": "beta"})
