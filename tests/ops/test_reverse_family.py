"""Flow-GRPO, GRPO-Guard, Flow-CPS and Flow-DPPO: each against its float64 reference, and all a caller relies on."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import advflow_ext as af
from advflow_ext.testing import UNIT_ROUNDOFF, assert_close_to_truth
from advflow_ext.testing.transition_strategies import TABLES, TransitionBatch, transition_batches
from tests.ops.transitions import (
    BOTH,
    FULL,
    LOSSES,
    VARIANTS,
    closed_form,
    draw_transitions,
    native,
    reference,
    select,
    truth,
    value_and_grad,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def options_of(name: str) -> st.SearchStrategy[dict[str, Any]]:
    clip = st.sampled_from([0.0, 2e-6, 1e-4, 0.05, 0.5])
    if name == "flow_dppo":
        common = {
            "threshold": st.sampled_from([0.0, 1e-6, 1e-3, 0.1, 10.0]),
            "direction": st.sampled_from(["ratio", "log_ratio_minus_kl"]),
        }
        predictive = {"mask": st.just("predictive"), "step_size": st.sampled_from([1e-4, 0.01, 0.3])}
        return st.one_of(st.fixed_dictionaries(common), st.fixed_dictionaries({**common, **predictive}))
    if name == "grpo_guard":
        return st.fixed_dictionaries({"clip": clip, "time_weight": st.sampled_from(["inverse_dt", "none"])})
    conventions = st.sampled_from(["exact", "dt", "two_sigma_squared"])
    return st.fixed_dictionaries({"clip": clip, "kl_convention": conventions})


def decided(name: str, batch: TransitionBatch, tolerance: float) -> bool:
    """Whether no clip or mask hangs on the last bits: there, float32 and float64 may both be right."""
    form = closed_form(name, batch)
    error = tolerance * form.error
    if name == "flow_dppo":
        # On-policy everything is exactly 0 in both.
        heading = form.log_ratio - form.kl if batch.options["direction"] == "log_ratio_minus_kl" else form.log_ratio
        reach = form.reach if "step_size" in batch.options else form.kl
        near = (reach - batch.options["threshold"]).abs() <= 1e-5 * (reach.abs() + form.error)
        return not (((heading.abs() <= error) | near) & (form.kl != 0)).any()
    bounds = [math.log1p(sign * batch.options["clip"]) for sign in (1, -1)]
    near = torch.stack([(form.log_ratio - bound).abs() <= error + 1e-7 * abs(bound) for bound in bounds]).any(0)
    return not (near & (form.kl != 0)).any()


def assert_matches_truth(name: str, batch: TransitionBatch, tolerance: float = 1e-6) -> None:
    out, grad = value_and_grad(batch, native(name))
    expected, expected_grad = truth(name, batch)
    form = closed_form(name, batch)
    rows = max(batch.v.shape[0], 1) if batch.options.get("reduction", "mean") == "mean" else 1
    size = form.loss if batch.options.get("reduction") == "none" else form.loss.sum() / rows
    assert ((out.loss.double() - expected.loss).abs() <= tolerance * size).all()
    assert grad.dtype == batch.v.dtype and grad.shape == batch.v.shape
    roundoff, tiny = UNIT_ROUNDOFF[grad.dtype], torch.finfo(grad.dtype).tiny
    allowed = tolerance * form.grad / rows + (1.001 * expected_grad.abs() + tiny) * roundoff
    assert ((grad.double() - expected_grad).abs() <= allowed).all()
    counts = [list(out.metrics.names).index(which) for which in ("masked_samples", "nonfinite_samples")]
    assert torch.equal(out.metrics.values[counts].double(), expected.metrics.values[counts])


# ---------------------------------------------------------------------------------------------------------------------
# Against the truth: acceptance test 11.3


@pytest.mark.parametrize("name", LOSSES)
@given(st.data(), transition_batches())
@settings(max_examples=120)
def test_any_batch_matches_the_truth(name, data, batch):
    batch.options.update(data.draw(options_of(name)))
    assume(decided(name, batch, 1e-6))
    assert_matches_truth(name, batch)


@pytest.mark.parametrize("name", LOSSES)
@given(st.data(), transition_batches(dtypes=(torch.float64,)))
@settings(max_examples=50)
def test_any_float64_batch_matches_the_truth(name, data, batch):
    batch.options.update(data.draw(options_of(name)))
    assume(decided(name, batch, 1e-12))
    assert_matches_truth(name, batch, 1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize("name", LOSSES)
@given(st.data(), transition_batches(device="cuda"))
@settings(max_examples=60)
def test_any_cuda_batch_matches_the_truth(name, data, batch):
    batch.options.update(data.draw(options_of(name)))
    assume(decided(name, batch, 1e-6))
    assert_matches_truth(name, batch)


@pytest.mark.parametrize(("name", "options"), VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_512_pixel_latent_is_exact_to_one_in_a_million(name, options, dtype, device):
    drift = 0.01 if dtype == torch.float32 else 0.1
    others = draw_transitions(6, (16, 64, 64), dtype, device, drift=drift, **options)
    # v keeps the low-precision numbers in float32, so the gradient is seen before its rounding.
    batch = TransitionBatch(others.v.detach().float().requires_grad_(), *others.arguments()[1:], others.options)
    out, grad = value_and_grad(batch, native(name))
    expected, expected_grad = truth(name, batch)
    # The terms of a batch cancel: the loss is as exact as its largest term.
    size = closed_form(name, batch).loss.mean()
    assert (out.loss.double() - expected.loss).abs() <= 1e-6 * size
    for row, expected_row in zip(grad, expected_grad, strict=True):
        assert_close_to_truth(row, expected_row, 1e-6)


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_the_float32_reference_is_a_usable_fallback(name, options, device):
    batch = draw_transitions(6, (16, 32, 32), device=device, drift=0.1, **options)
    out, grad = value_and_grad(batch, reference(name))
    expected, expected_grad = truth(name, batch)
    torch.testing.assert_close(out.loss.double(), expected.loss, rtol=1e-4, atol=1e-4)
    assert_close_to_truth(grad, expected_grad, 1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Acceptance test 11.2: on-policy


@pytest.mark.parametrize("resolve", BOTH.values(), ids=BOTH)
@pytest.mark.parametrize("name", LOSSES)
def test_on_policy_nothing_is_clipped_and_the_gradient_is_the_score(name, resolve, device):
    batch = draw_transitions(10, (3, 8, 8), device=device, with_reference=False)
    batch = batch.map(lambda tensor: tensor)
    with torch.no_grad():
        batch.v.copy_(batch.v_old)
    out, grad = value_and_grad(batch, resolve(name))
    metrics = out.metrics.as_dict()
    assert metrics["max_abs_log_ratio"] == metrics["mean_kl_old"] == metrics["masked_samples"] == 0
    step = batch.table.rows(batch.index, torch.float64)
    slope = {
        "flow_grpo": step.kappa,
        "flow_dppo": step.kappa,
        "flow_cps": 2 * step.sigma * step.c_v,
        "grpo_guard": step.c_v / -step.dt,
    }[name]
    expected = -(batch.advantages * slope).view(-1, 1, 1, 1) * batch.eps.double() / (10 * 192)
    assert_close_to_truth(grad, expected, 1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Acceptance test 11.5: statistics under the rollout policy


def log_ratios(batch: TransitionBatch) -> torch.Tensor:
    """Mean-reduced log-ratios: with A = -1 and nothing masked, Flow-DPPO's loss is the ratio."""
    loss = native("flow_dppo")(
        *batch.arguments()[:5], -torch.ones_like(batch.advantages), threshold=1e9, reduction="none"
    )
    return loss.loss.detach().log()


@pytest.mark.parametrize("table", TABLES[:1] + TABLES[2:], ids=["flow_sde", "dance_sde", "cps"])
def test_ratio_statistics_under_the_rollout_policy(table):
    samples, D = 20_000, 12
    generator = torch.Generator().manual_seed(0)
    v_old = torch.randn(1, D, generator=generator, dtype=torch.float64)
    delta = torch.randn(1, D, generator=generator, dtype=torch.float64)
    step = 3
    kappa = float(table.kappa[step])
    delta *= math.sqrt(2 * 0.4) / (abs(kappa) * delta.norm())  # 0.4 nats in all
    eps = torch.randn(samples, D, generator=generator, dtype=torch.float64)
    batch = TransitionBatch(
        (v_old + delta).expand(samples, D), v_old.expand(samples, D), eps, table,
        torch.full((samples,), step), torch.ones(samples),
    )  # fmt: skip
    log_ratio = D * log_ratios(batch)  # the log-ratio of the whole vector
    ratio = log_ratio.exp()
    standard_error = 1 / math.sqrt(samples)
    assert abs(log_ratio.mean() + 0.4) < 4 * math.sqrt(0.8) * standard_error  # E[log r] = -KL
    assert abs(log_ratio.var() - 0.8) < 4 * 0.8 * math.sqrt(2) * standard_error  # Var = 2 KL
    assert abs(ratio.mean() - 1) < 4 * math.sqrt(math.exp(0.8) - 1) * standard_error  # E[r] = 1
    left = 0.5 * math.erfc(-math.sqrt(0.4 / 2) / math.sqrt(2))  # Phi(sqrt(KL / 2))
    assert abs((ratio < 1).double().mean() - left) < 4 * 0.5 * standard_error


# ---------------------------------------------------------------------------------------------------------------------
# Acceptance test 11.8: RatioNorm


@pytest.mark.parametrize("step", [0, 4, 8])
def test_guard_normalises_the_spread_whatever_sigma(step):
    table = TABLES[0]
    samples, D = 4000, 256
    generator = torch.Generator().manual_seed(step)
    v_old, delta = torch.randn(2, D, generator=generator, dtype=torch.float64).unbind()
    delta = delta * 1e-3 / abs(float(table.c_v[step]))  # the same shift of the mean at every step
    eps = torch.randn(samples, D, generator=generator, dtype=torch.float64)
    out = af.grpo_guard_loss(
        (v_old + delta).expand(samples, D), v_old.expand(samples, D), eps, table,
        torch.full((samples,), step), -torch.ones(samples), clip=0.5, time_weight="none", reduction="none",
    )  # fmt: skip
    log_ratio = out.loss.log()
    spread = float((float(table.c_v[step]) * delta).square().mean().sqrt()) / math.sqrt(D)
    assert abs(log_ratio.mean()) < 4 * spread / math.sqrt(samples)
    assert abs(log_ratio.std() / spread - 1) < 4 / math.sqrt(2 * samples)


# ---------------------------------------------------------------------------------------------------------------------
# The clip


@pytest.mark.parametrize("resolve", BOTH.values(), ids=BOTH)
@pytest.mark.parametrize("name", ["flow_grpo", "grpo_guard", "flow_cps"])
def test_clip_truth_table(name, resolve):
    """Ratios just outside and just inside of either bound, for advantages of both signs and none.

    The bounds of the log-ratio are log(1.1) = 0.0953 and log(0.9) = -0.1054, not the clip of 0.1.
    """
    batch = draw_transitions(12, (64,), torch.float64, with_reference=False)
    batch.index.fill_(3)
    step = batch.table.rows(batch.index, torch.float64)
    slope = {"flow_grpo": step.kappa, "grpo_guard": step.c_v, "flow_cps": 2 * step.sigma * step.c_v}[name]
    quadratic = {"flow_grpo": step.kappa.square() / 2, "grpo_guard": 0, "flow_cps": step.c_v.square()}[name]
    delta = batch.v.detach() - batch.v_old
    aim = torch.tensor([0.098, 0.09, -0.102, -0.108]).repeat(3).double()
    along = (aim + quadratic * delta.square().mean(1)) / (slope * delta.square().mean(1))
    batch.eps.copy_(along[:, None] * delta)
    A = torch.tensor([1.0, -1.0, 0.0]).repeat_interleave(4)
    batch.advantages.copy_(A)
    batch.options = {"clip": 0.1, "reduction": "none"}
    out, grad = value_and_grad(batch, resolve(name))
    r = aim.exp()
    expected = torch.cat([-r[:4].clamp(max=1.1), r[4:8].clamp(min=0.9), 0 * r[8:]])
    weight = -1 / step.dt if name == "grpo_guard" else 1
    torch.testing.assert_close(out.loss, weight * expected, rtol=1e-9, atol=1e-12)
    assert grad.any(1).tolist() == [False, True, True, True, True, True, True, False, *[False] * 4]
    assert out.metrics.as_dict()["masked_samples"] == 2


@pytest.mark.parametrize("name", ["flow_grpo", "grpo_guard", "flow_cps"])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_ratio_exactly_on_the_bound_keeps_its_gradient(name, sign):
    # clip = 0 puts the bound at log-ratio 0, which v = v_old meets exactly.
    batch = draw_transitions(2, (33,), with_reference=False, clip=0.0)
    with torch.no_grad():
        batch.v.copy_(batch.v_old)
    batch.advantages.fill_(sign)
    for resolve in BOTH.values():
        out, grad = value_and_grad(batch, resolve(name))
        assert out.metrics.as_dict()["masked_samples"] == 0 and grad.any(1).all()


# ---------------------------------------------------------------------------------------------------------------------
# The reference term


@pytest.mark.parametrize("resolve", BOTH.values(), ids=BOTH)
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("convention", ["exact", "dt", "two_sigma_squared"])
def test_the_reference_term_is_the_released_one(name, resolve, convention):
    options = {"kl_convention": convention} if name in ("flow_grpo", "flow_cps") else {}
    if convention != "exact" and not options:
        pytest.skip("this loss has the exact KL alone")
    batch = draw_transitions(6, (3, 8), torch.float64, reduction="none", **options)
    batch.advantages.zero_()
    table, index = batch.table, batch.index
    mean, mean_ref = (table.c_v[index].view(-1, 1, 1) * y.detach() for y in (batch.v, batch.options["v_ref"]))
    squares = (mean - mean_ref).square().mean((1, 2))
    std_dev_t = table.sigma[index] / (-table.dt[index]).sqrt()  # flow_grpo's, without the root of the step
    expected = {
        "exact": squares / (2 * table.sigma[index] ** 2),
        "dt": squares / (2 * std_dev_t**2),
        "two_sigma_squared": squares,
    }[convention]
    out, _ = value_and_grad(batch, resolve(name))
    torch.testing.assert_close(out.loss, 0.04 * expected, rtol=1e-12, atol=0)


# ---------------------------------------------------------------------------------------------------------------------
# Independence: of the batch, of threads, of repeats


@pytest.mark.parametrize(("name", "options"), FULL)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(1,), (33,), (3, 5, 7)])
def test_a_transition_does_not_see_its_batch(name, options, shape, dtype, device):
    batch = draw_transitions(5, shape, dtype, device, **options)
    out, grad = value_and_grad(batch, native(name))
    order = torch.tensor([3, 0, 4, 1, 2], device=device)
    shuffled, shuffled_grad = value_and_grad(select(batch, order), native(name))
    assert torch.equal(shuffled.loss, out.loss[order]) and torch.equal(shuffled_grad, grad[order])
    for row in range(5):
        alone, alone_grad = value_and_grad(select(batch, slice(row, row + 1)), native(name))
        assert torch.equal(alone.loss[0], out.loss[row]) and torch.equal(alone_grad[0], grad[row])


@pytest.mark.parametrize("name", LOSSES)
def test_a_long_batch_is_its_rows(name, device):
    """Long enough for vectorised scalar arithmetic, whose tail must round alike."""
    batch = draw_transitions(37, (65,), device=device, reduction="none")
    out, grad = value_and_grad(batch, native(name))
    for row in range(37):
        alone, alone_grad = value_and_grad(select(batch, slice(row, row + 1)), native(name))
        assert torch.equal(alone.loss[0], out.loss[row]) and torch.equal(alone_grad[0], grad[row])


@pytest.mark.parametrize("name", LOSSES)
def test_threads_and_repeats_do_not_change_a_bit(name):
    batch = draw_transitions(3, (8, 64, 41), reduction="none")
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 1, 2, 3):
            torch.set_num_threads(threads)
            results.append(value_and_grad(batch, native(name)))
    finally:
        torch.set_num_threads(before)
    for out, grad in results[1:]:
        assert torch.equal(out.loss, results[0][0].loss) and torch.equal(grad, results[0][1])
        assert torch.equal(out.metrics.values, results[0][0].metrics.values)


@pytest.mark.parametrize("name", LOSSES)
def test_accumulated_microbatches_are_the_batch(name, device):
    batch = draw_transitions(6, (16, 9, 9), device=device, reduction="sum")
    whole = value_and_grad(batch, native(name))[1]
    parts = [value_and_grad(select(batch, slice(k, k + 2)), native(name))[1] for k in (0, 2, 4)]
    assert torch.equal(torch.cat(parts), whole)
