"""The native loss against the float64 reference, and everything a caller may rely on.

One file, for it is what tests/build/test_sanitizer.py and the newest torch run of the losses.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings

import advflow_ext as af
from advflow_ext import _native
from advflow_ext.testing import ACCUMULATED_ERROR, assert_close_to_truth, assert_rounded_once
from advflow_ext.testing.strategies import Batch, batches
from tests.ops.helpers import BOTH, NATIVE, REFERENCE, draw_batch, select, truth, value_and_grad

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
WEIGHTINGS = ("prediction", "velocity", "adaptive")

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def assert_matches_truth(batch: Batch) -> None:
    out, grad = value_and_grad(batch)
    expected, expected_grad = truth(batch)
    accumulate = torch.float64 if batch.v.dtype == torch.float64 else torch.float32
    # Terms of opposite sign cancel, so the error of the value is measured against what was added up.
    gamma, beta = batch.options.get("gamma", 1.1), batch.options.get("beta", 1.0)
    gamma = {"1-A": 1 - batch.advantages, "beta(beta-A)": beta * (beta - batch.advantages)}.get(gamma, gamma)
    options = {**batch.options, "gamma": abs(gamma)}
    size = truth(Batch(*batch.arguments()[:4], batch.advantages.abs(), options))[0].loss
    assert ((out.loss.double() - expected.loss).abs() <= ACCUMULATED_ERROR[accumulate] * size).all()
    assert grad.dtype == batch.v.dtype and grad.shape == batch.v.shape
    if batch.v.dtype in ACCUMULATED_ERROR:
        assert_close_to_truth(grad, expected_grad, ACCUMULATED_ERROR[accumulate])
    assert_rounded_once(grad, expected_grad, ACCUMULATED_ERROR[accumulate])


@given(batches())
@settings(max_examples=150)
def test_any_batch_matches_the_truth(batch):
    assert_matches_truth(batch)


@given(batches(dtypes=(torch.float64,)))
@settings(max_examples=40)
def test_any_float64_batch_matches_the_truth(batch):
    out, grad = value_and_grad(batch)
    expected, expected_grad = value_and_grad(batch, REFERENCE)
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-12, atol=1e-13)
    assert_close_to_truth(grad, expected_grad, 1e-12)


@pytest.mark.gpu
@given(batches(device="cuda"))
@settings(max_examples=150)
def test_any_cuda_batch_matches_the_truth(batch):
    assert_matches_truth(batch)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_512_pixel_latent_is_exact_to_one_in_a_million(dtype, weighting, device):
    others = draw_batch(8, (16, 64, 64), dtype, device, weighting=weighting)
    # v keeps the low-precision numbers in float32, so the gradient is seen before its rounding.
    batch = Batch(others.v.detach().float().requires_grad_(), *others.arguments()[1:], others.options)
    out, grad = value_and_grad(batch)
    expected, expected_grad = truth(batch)
    assert_close_to_truth(out.loss, expected.loss, 1e-6)
    assert_close_to_truth(grad, expected_grad, 1e-6)
    for row, expected_row in zip(grad, expected_grad, strict=True):
        assert_close_to_truth(row, expected_row, 1e-6)


@pytest.mark.parametrize("dtype", FLOATS)
def test_error_is_not_above_what_the_same_formula_has_in_plain_pytorch(dtype, device):
    batch = draw_batch(8, (16, 32, 32), dtype, device, reduction="none", weighting="velocity")
    o, p = batch.options["v_old"], batch.options["v_ref"]
    v = batch.v.detach().requires_grad_()
    A = batch.advantages.to(dtype).view(-1, 1, 1, 1)
    u = batch.noise - batch.x0
    eager = (A * (v - u).square() + 1.1 * (v - o).square() + 1e-3 * (v - p).square()).mean((1, 2, 3))
    (eager_grad,) = torch.autograd.grad(eager.sum(), v)
    out, grad = value_and_grad(batch)
    expected, expected_grad = truth(batch)
    error, eager_error = ((x.double() - expected.loss).norm() for x in (out.loss, eager))
    assert error <= 1.5 * eager_error + 1e-6 * expected.loss.norm()
    error, eager_error = ((x.double() - expected_grad).norm() for x in (grad, eager_grad))
    assert error <= 1.1 * eager_error + 1e-6 * expected_grad.norm()


# ---------------------------------------------------------------------------------------------------------------------
# Independence: of the batch, of threads, of repeats


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(1,), (33,), (3, 5, 7), (16, 33, 31)])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_a_sample_does_not_see_its_batch(shape, dtype, weighting, device):
    batch = draw_batch(5, shape, dtype, device, weighting=weighting, reduction="none")
    out, grad = value_and_grad(batch)
    order = torch.tensor([3, 0, 4, 1, 2], device=device)
    shuffled, shuffled_grad = value_and_grad(select(batch, order))
    assert torch.equal(shuffled.loss, out.loss[order]) and torch.equal(shuffled_grad, grad[order])
    for row in range(5):
        alone, alone_grad = value_and_grad(select(batch, slice(row, row + 1)))
        assert torch.equal(alone.loss[0], out.loss[row]) and torch.equal(alone_grad[0], grad[row])


def test_alignment_does_not_change_a_bit(device):
    batch = draw_batch(2, (4, 129), device=device, reduction="none")
    out, grad = value_and_grad(batch)

    def shift(tensor):
        buffer = tensor.new_empty(tensor.numel() + 1)
        buffer[1:] = tensor.detach().flatten()
        return buffer[1:].view(tensor.shape)

    options = {k: shift(x) if isinstance(x, torch.Tensor) else x for k, x in batch.options.items()}
    moved = Batch(
        shift(batch.v).requires_grad_(), shift(batch.x0), shift(batch.noise), batch.t, batch.advantages, options
    )
    moved_out, moved_grad = value_and_grad(moved)
    assert torch.equal(out.loss, moved_out.loss) and torch.equal(grad, moved_grad)


def test_threads_do_not_change_a_bit():
    batch = draw_batch(3, (8, 64, 41), reduction="none")
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(value_and_grad(batch))
    finally:
        torch.set_num_threads(before)
    for out, grad in results[1:]:
        assert torch.equal(out.loss, results[0][0].loss) and torch.equal(grad, results[0][1])
        assert torch.equal(out.metrics.values, results[0][0].metrics.values)


def test_repeats_do_not_change_a_bit(device):
    batch = draw_batch(8, (16, 64, 64), torch.bfloat16, device)
    out, grad = value_and_grad(batch)
    for _ in range(5):
        again, again_grad = value_and_grad(batch)
        assert torch.equal(out.loss, again.loss) and torch.equal(grad, again_grad)


def test_accumulated_microbatches_are_the_batch(device):
    batch = draw_batch(6, (16, 9, 9), device=device, reduction="sum")
    whole = value_and_grad(batch)[1]
    parts = [value_and_grad(select(batch, slice(k, k + 2)))[1] for k in (0, 2, 4)]
    assert torch.equal(torch.cat(parts), whole)


# ---------------------------------------------------------------------------------------------------------------------
# Bad samples

BAD = [
    (name, value)
    for name in ("v", "x0", "noise", "v_old", "v_ref", "t", "advantages", "gamma")
    for value in (float("nan"), float("inf"), -float("inf"))
]
BAD += [(name, 3e38) for name in ("v", "x0", "v_old", "v_ref")]  # finite, but its square is not


@pytest.mark.parametrize("loss", BOTH.values(), ids=BOTH)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_bad_sample_is_dropped_and_touches_no_other(name, value, weighting, loss, device):
    gamma = torch.full((4,), 1.3, device=device)
    batch = draw_batch(4, (3, 5, 7), device=device, weighting=weighting, reduction="none", gamma=gamma)
    clean, clean_grad = value_and_grad(batch, loss)
    broken = select(batch, slice(None))
    tensor = broken.options[name] if name in broken.options else getattr(broken, name)
    with torch.no_grad():
        tensor[1].view(-1)[-1] = value
    out, grad = value_and_grad(broken, loss)
    assert out.loss[1] == 0 and not grad[1].any()
    others = torch.tensor([0, 2, 3], device=device)
    assert torch.equal(out.loss[others], clean.loss[others]) and torch.equal(grad[others], clean_grad[others])
    metrics = out.metrics.as_dict()
    assert metrics["nonfinite_samples"] == 1
    assert metrics["nonconvex_samples"] == 0
    assert all(number == number for number in metrics.values())
    assert metrics["loss"] == pytest.approx(clean.loss[others].mean().item(), rel=1e-6)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_a_bad_sample_with_zero_weights_is_still_counted(weighting):
    batch = draw_batch(3, weighting=weighting, gamma=0.0, lam=0.0)
    batch.advantages[1] = 0
    batch.x0[1, 0] = float("nan")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out, grad = value_and_grad(batch)
    assert not grad[1].any() and out.metrics.as_dict()["nonfinite_samples"] == 1


@pytest.mark.parametrize("loss", BOTH.values(), ids=BOTH)
@pytest.mark.parametrize("value", [0.0, -0.25, 1.0001])
def test_t_out_of_range(loss, value, device):
    batch = draw_batch(3, device=device, reduction="none")
    batch.t[2] = value
    if device == "cpu":
        with pytest.raises(ValueError, match=rf"t\[2\] is {value:.6g}; accepted is 0 < t <= 1"):
            loss(*batch.arguments(), **batch.options)
    else:
        out, grad = value_and_grad(batch, loss)
        assert out.loss[2] == 0 and not grad[2].any() and out.metrics.as_dict()["invalid_timesteps"] == 1


# ---------------------------------------------------------------------------------------------------------------------
# Edge cases of the method


@pytest.mark.parametrize("t", [1.0, 8.9e-3])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_both_ends_of_time(t, weighting, device):
    batch = draw_batch(3, device=device, weighting=weighting, reduction="none")
    batch.t.fill_(t)
    assert_matches_truth(batch)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_on_policy_first_step(weighting, device):
    batch = draw_batch(3, device=device, weighting=weighting, reduction="none")
    batch.options["v_old"] = batch.v.detach().clone()
    out, _ = value_and_grad(batch)
    assert out.metrics.as_dict()["rollout_deviation"] == 0
    assert_matches_truth(batch)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_policy_that_hits_its_target(weighting, device):
    batch = draw_batch(3, device=device, weighting=weighting, reduction="none")
    with torch.no_grad():
        batch.v.copy_(batch.noise - batch.x0)
    assert value_and_grad(batch)[0].metrics.as_dict()["target_error"] == 0  # w sits on its floor
    assert_matches_truth(batch)


def test_zero_advantages_leave_the_anchors(device):
    batch = draw_batch(3, device=device, weighting="velocity", reduction="none")
    batch.advantages.zero_()
    assert_matches_truth(batch)
    other = select(batch, slice(None))
    other.x0.normal_()
    assert torch.equal(value_and_grad(batch)[1], value_and_grad(other)[1])


@pytest.mark.parametrize(("gamma", "lam"), [(1.1, 0.0), (1.1, 1e-3), (1.0001, 0.0)])
def test_smallest_curvature(gamma, lam, device):
    batch = draw_batch(3, device=device, gamma=gamma, lam=lam, reduction="none")
    batch.advantages.fill_(-1)
    assert value_and_grad(batch)[0].metrics.as_dict()["min_curvature"] == pytest.approx(gamma - 1 + lam, rel=1e-3)
    assert_matches_truth(batch)


def test_negative_rollout_weight_is_allowed_while_the_sum_is_positive(device, recwarn):
    batch = draw_batch(3, device=device, gamma=torch.full((3,), -0.4, device=device), reduction="none")
    batch.advantages.fill_(1.0)
    assert_matches_truth(batch)
    assert not recwarn.list


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_more_than_2_to_the_24_elements(dtype):
    generator = torch.Generator().manual_seed(0)
    few = torch.randn(5, 4099, generator=generator)
    # Tiled numbers: the truth of the long sample is that of the short one.
    v, x0, noise, o, p = (row.to(dtype).repeat(4097).view(1, -1) for row in few)
    assert v.numel() > 2**24
    t, A = torch.tensor([0.7]), torch.tensor([-0.3])
    long = Batch(v.requires_grad_(), x0, noise, t, A, {"v_old": o, "v_ref": p, "reduction": "none"})
    short = [row.to(dtype).view(1, -1) for row in few]
    expected, expected_grad = truth(
        Batch(
            short[0].requires_grad_(), short[1], short[2], t, A, {**long.options, "v_old": short[3], "v_ref": short[4]}
        )
    )
    out, grad = value_and_grad(long)
    assert_close_to_truth(out.loss, expected.loss, 1e-6)
    assert_rounded_once(grad[:, :4099] * 4096, expected_grad * 4096 / 4097)
    assert torch.equal(grad[:, -4099:], grad[:, :4099])


@pytest.mark.parametrize("loss", BOTH.values(), ids=BOTH)
@pytest.mark.parametrize("shape", [(0, 4), (0, 3, 8, 8), (3, 0), (2, 4, 0)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_empty_batch_and_empty_samples(loss, shape, reduction, device):
    batch = draw_batch(shape[0], shape[1:], device=device, reduction=reduction)
    out, grad = value_and_grad(batch, loss)
    assert grad.shape == shape and not out.loss.any()
    assert out.metrics.as_dict()["nonfinite_samples"] == 0


# ---------------------------------------------------------------------------------------------------------------------
# Autograd


@pytest.mark.parametrize("weighting", ["prediction", "velocity"])
@pytest.mark.parametrize("gamma", [1.1, "1-A"])
def test_gradcheck(weighting, gamma):
    batch = draw_batch(2, (3, 2), torch.float64, weighting=weighting, gamma=gamma, reduction="none")
    assert torch.autograd.gradcheck(
        lambda v: NATIVE(v, *batch.arguments()[1:], **batch.options).loss, (batch.v,), nondet_tol=0.0
    )


def test_gradient_flows_to_v_only(device):
    batch = draw_batch(device=device, gamma=torch.full((4,), 1.1, device=device))
    leaves = [*batch.arguments()[1:], *(x for x in batch.options.values() if isinstance(x, torch.Tensor))]
    for leaf in leaves:
        leaf.requires_grad_()
    for loss in BOTH.values():
        loss(*batch.arguments(), **batch.options).loss.backward()
        assert all(leaf.grad is None for leaf in leaves) and batch.v.grad is not None


def test_without_grad_nothing_is_recorded(device):
    batch = draw_batch(device=device)
    with torch.no_grad():
        assert not NATIVE(*batch.arguments(), **batch.options).loss.requires_grad
    out = NATIVE(batch.v.detach(), *batch.arguments()[1:], **batch.options)
    assert not out.loss.requires_grad and not out.metrics.values.requires_grad


def test_only_inputs_and_per_sample_numbers_are_saved(device):
    batch = draw_batch(4, (16, 8, 8), device=device)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        NATIVE(*batch.arguments(), **batch.options)
    inputs = {batch.v.data_ptr(), batch.x0.data_ptr(), batch.noise.data_ptr()}
    inputs |= {batch.options["v_old"].data_ptr(), batch.options["v_ref"].data_ptr()}
    large = [x for x in saved if x.data_ptr() not in inputs]
    assert {x.data_ptr() for x in saved} >= inputs
    assert all(x.numel() <= 4 * 3 for x in large)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_forward_is_two_native_launches_and_backward_one(weighting, device):
    batch = draw_batch(device=device, weighting=weighting)
    module = _native.module
    assert module is not None
    module.reset_launch_count()
    out = NATIVE(*batch.arguments(), **batch.options)
    assert module.launch_count() == 2
    out.loss.backward()
    assert module.launch_count() == 3


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_second_derivative_is_refused(device):
    batch = draw_batch(device=device)
    out = NATIVE(*batch.arguments(), **batch.options)
    (grad,) = torch.autograd.grad(out.loss, batch.v, create_graph=True)
    with pytest.raises(RuntimeError, match="residual_grad is not implemented"):
        torch.autograd.grad(grad.sum(), batch.v)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_loss_scale_reaches_the_gradient_before_its_rounding(dtype, device):
    batch = draw_batch(8, (16, 64, 64), dtype, device)
    batch.t.fill_(0.02)  # t^2 * 2 / (D B) = 1.5e-9: below the smallest float16
    scale = 2.0**16
    out = NATIVE(*batch.arguments(), **batch.options)
    (grad,) = torch.autograd.grad(out.loss * scale, batch.v)
    _, expected = truth(batch)
    assert_rounded_once(grad, expected * scale)
    assert (grad != 0).double().mean() > 0.99
    if dtype == torch.float16:  # rounded first and scaled later it would be lost
        assert (expected.to(dtype) == 0).all()


def test_autocast_changes_nothing(device):
    batch = draw_batch(dtype=torch.bfloat16, device=device)
    out, grad = value_and_grad(batch)
    with torch.autocast(device, torch.bfloat16):
        inside, inside_grad = value_and_grad(batch)
    assert inside.loss.dtype == torch.float32
    assert torch.equal(out.loss, inside.loss) and torch.equal(grad, inside_grad)


# ---------------------------------------------------------------------------------------------------------------------
# torch.compile


@pytest.mark.parametrize("loss", BOTH.values(), ids=BOTH)
@pytest.mark.parametrize(("weighting", "gamma"), [("prediction", 1.1), ("adaptive", "1-A"), ("velocity", "tensor")])
def test_compiles_without_graph_breaks(loss, weighting, gamma, device):
    gamma = torch.full((4,), 1.2, device=device) if gamma == "tensor" else gamma
    batch = draw_batch(device=device, weighting=weighting, gamma=gamma)
    torch._dynamo.reset()
    out, grad = value_and_grad(batch, torch.compile(loss, fullgraph=True, backend="aot_eager"))
    expected, expected_grad = value_and_grad(batch, loss)
    torch.testing.assert_close(out.loss, expected.loss)
    torch.testing.assert_close(out.metrics.values, expected.metrics.values)
    torch.testing.assert_close(grad, expected_grad)


@pytest.mark.slow
def test_compiles_with_inductor(device):
    torch.use_deterministic_algorithms(False)
    batch = draw_batch(device=device)
    torch._dynamo.reset()
    out, grad = value_and_grad(batch, torch.compile(NATIVE, fullgraph=True))
    expected, expected_grad = value_and_grad(batch)
    torch.testing.assert_close(out.loss, expected.loss)
    torch.testing.assert_close(grad, expected_grad)
    torch.use_deterministic_algorithms(True)


# ---------------------------------------------------------------------------------------------------------------------
# What the caller is told


def test_metrics_say_what_happened(device):
    batch = draw_batch(4, device=device)
    for loss in BOTH.values():
        metrics = loss(*batch.arguments(), **batch.options).metrics
        assert metrics.values.shape == (len(metrics.names),) and metrics.values.device.type == device
        numbers = metrics.as_dict()
        assert tuple(numbers) == metrics.names
        v, u, o, p = batch.v.detach(), batch.noise - batch.x0, batch.options["v_old"], batch.options["v_ref"]
        A, m = batch.advantages, batch.t.square()
        deviations = [(v - anchor).square().mean((1, 2, 3)) for anchor in (u, o, p)]
        expected = {
            "loss": (m * (A * deviations[0] + 1.1 * deviations[1] + 1e-3 * deviations[2])).mean(),
            "policy_term": (m * A * deviations[0]).mean(),
            "target_error": deviations[0].mean(),
            "rollout_deviation": deviations[1].mean(),
            "reference_deviation": deviations[2].mean(),
            "mean_advantage": A.mean(),
            "mean_abs_advantage": A.abs().mean(),
            "min_curvature": (A + 1.1 + 1e-3).min(),
            "nonconvex_samples": 0,
            "nonfinite_samples": 0,
            "invalid_timesteps": 0,
        }
        for name, value in expected.items():
            assert numbers[name] == pytest.approx(float(value), rel=1e-5, abs=1e-7), name


@pytest.mark.parametrize("loss", BOTH.values(), ids=BOTH)
def test_lost_convexity_is_said_once_with_the_numbers(loss, device):
    batch = draw_batch(4, device=device, gamma=0.5, lam=0.0)
    batch.advantages.copy_(torch.tensor([0.5, -1.0, -0.75, -0.5]))
    with pytest.warns(UserWarning, match=r"3 sample\(s\) have A \+ gamma \+ lam <= 0 \(smallest -0.5\)"):
        numbers = loss(*batch.arguments(), **batch.options).metrics.as_dict()
    assert numbers["nonconvex_samples"] == 3 and numbers["min_curvature"] == -0.5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(*batch.arguments(), **batch.options).metrics.as_dict()


def wrong(**changes):
    return changes


MISUSE = [
    (wrong(v=torch.randn(4)), r"v has shape \[4\]; accepted are a batch dimension and at least one more"),
    (wrong(v=[1.0]), r"v is a list; accepted is a floating-point torch.Tensor"),
    (wrong(v=torch.ones(4, 6, dtype=torch.int64)), r"v has dtype torch.int64; accepted are float32"),
    (wrong(x0=torch.randn(4, 5)), r"x0 has shape \[4, 5\]; accepted is the shape of v, \[4, 6\]"),
    (wrong(noise=torch.randn(1, 6)), r"noise has shape \[1, 6\]"),
    (wrong(v_old=None), r"v_old is a NoneType"),
    (wrong(v_ref=torch.randn(4, 6, 1)), r"v_ref has shape \[4, 6, 1\]"),
    (wrong(x0=torch.randn(4, 6, device="meta")), r"x0 is on meta; accepted is the device of v, cpu"),
    (wrong(t=torch.rand(1, 4)), r"t has shape \[1, 4\]; accepted is one value a sample, \[4\]"),
    (wrong(t=0.5), r"t is a float; accepted"),
    (wrong(advantages=torch.rand(3)), r"advantages has shape \[3\]"),
    (wrong(advantages=torch.ones(4, dtype=torch.int32)), r"advantages has dtype torch.int32"),
    (wrong(gamma="1+A"), r"gamma is '1\+A'; accepted are a number, a \[B\] tensor"),
    (wrong(gamma=torch.rand(5)), r"gamma has shape \[5\]"),
    (wrong(gamma=float("nan")), r"gamma is nan; accepted are a finite number"),
    (wrong(gamma=None), r"gamma is None; accepted"),
    (wrong(lam=-1.0), r"lam is -1.0; accepted is a finite number of at least 0"),
    (wrong(lam=torch.tensor(-0.1)), r"lam is -0.1; accepted is a finite number"),
    (wrong(weighting="t"), r"weighting is 't'; accepted are 'prediction', 'velocity', 'adaptive'"),
    (wrong(reduction="avg"), r"reduction is 'avg'; accepted are 'mean', 'sum', 'none'"),
]


@pytest.mark.parametrize("loss", BOTH.values(), ids=BOTH)
@pytest.mark.parametrize(("change", "sentence"), MISUSE)
def test_misuse_is_said_in_a_sentence(loss, change, sentence):
    batch = draw_batch(4, (6,))
    arguments = {**dict(zip(("v", "x0", "noise", "t", "advantages"), batch.arguments(), strict=True)), **batch.options}
    with pytest.raises(ValueError, match=sentence):
        loss(**{**arguments, **change})


@pytest.mark.skipif("cuda" not in _native.DEVICES, reason="built without CUDA kernels")
def test_float64_on_cuda_is_refused_in_a_sentence():
    with torch._subclasses.FakeTensorMode():  # needs no GPU
        v, one = torch.empty(2, 3, device="cuda", dtype=torch.float64), torch.empty(2, device="cuda")
        with pytest.raises(ValueError, match="a latent is float64 on CUDA; accepted there are float32, float16 and"):
            NATIVE(v, v, v, one, one, v_old=v)


def test_unknown_device_is_served_by_the_reference(monkeypatch):
    batch = draw_batch()
    expected = value_and_grad(batch, REFERENCE)
    monkeypatch.setattr(_native, "DEVICES", frozenset())
    monkeypatch.setattr(_native, "_devices_warned_of", set())
    with pytest.warns(RuntimeWarning, match="built without cpu kernels"):
        out, grad = value_and_grad(batch)
    assert torch.equal(out.loss, expected[0].loss) and torch.equal(grad, expected[1])
    assert isinstance(out, af.LossOutput)
