"""Flow-GRPO, GRPO-Guard, Flow-CPS and Flow-DPPO: each against its float64 reference, and all a caller relies on."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import advflow_ext as af
from advflow_ext import _native
from advflow_ext.testing import UNIT_ROUNDOFF, assert_close_to_truth
from advflow_ext.testing.transition_strategies import TABLES, TransitionBatch, shifted, transition_batches
from tests.ops.transitions import (
    BOTH,
    LOSSES,
    closed_form,
    draw_transitions,
    native,
    reference,
    select,
    truth,
    value_and_grad,
)

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# Every branch of every loss, for the tests that do not draw their options.
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("flow_grpo", {}),
    ("flow_grpo", {"kl_convention": "dt"}),
    ("flow_grpo", {"kl_convention": "two_sigma_squared", "clip": 0.0}),
    ("grpo_guard", {}),
    ("grpo_guard", {"time_weight": "none", "clip": 1e-3}),
    ("flow_cps", {}),
    ("flow_dppo", {}),
    ("flow_dppo", {"direction": "log_ratio_minus_kl", "threshold": 1e-3}),
    ("flow_dppo", {"mask": "predictive", "step_size": 0.01, "threshold": 1e-3}),
]
FULL = [(name, {**options, "reduction": "none"}) for name, options in VARIANTS]

pytestmark = pytest.mark.usefixtures("poisoned_memory")


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
# Acceptance test 11.6: what float32 keeps of a log-ratio near a trust region's bound


def near_policy(target_kl: float, step: int, seed: int) -> TransitionBatch:
    """24 transitions of 65536 elements with that mean-reduced KL, every number exact in float32."""
    table = TABLES[0]
    generator = torch.Generator().manual_seed(seed)
    v_old, delta, eps = torch.randn(3, 24, 65536, generator=generator).unbind()
    v_old = 1.2 * v_old
    delta = delta * (math.sqrt(2 * target_kl) / abs(float(table.kappa[step])))
    advantages = 2 * torch.rand(24, generator=generator) - 1
    return TransitionBatch(
        (v_old + delta).requires_grad_(), v_old, eps, table, torch.full((24,), step), advantages, {"reduction": "none"}
    )


@pytest.mark.parametrize("target_kl", [1e-9, 1e-8, 1e-7, 1e-6, 1e-5])
@pytest.mark.parametrize("step", [1, 5, 8])
def test_log_ratio_kl_and_mask_survive_float32(target_kl, step):
    batch = near_policy(target_kl, step, seed=step)
    form = closed_form("flow_dppo", batch)
    singles = [select(batch, slice(row, row + 1)) for row in range(0, 24, 2)]
    metrics = [native("flow_dppo")(*one.arguments(), threshold=1e9).metrics.as_dict() for one in singles]
    log_ratio = torch.tensor([numbers["mean_log_ratio"] for numbers in metrics], dtype=torch.float64)
    kl = torch.tensor([numbers["mean_kl_old"] for numbers in metrics], dtype=torch.float64)
    assert (log_ratio - form.log_ratio[::2]).abs().max() <= 2e-10
    assert torch.equal(log_ratio.sign(), form.log_ratio[::2].sign())
    assert ((kl / form.kl[::2] - 1).abs() <= 1e-5).all()

    # The threshold splits the batch in two halves, and so does the sign of A log r.
    threshold = float(form.kl.median()) * (1 + 1e-4)
    masked = native("flow_dppo")(*batch.arguments(), threshold=threshold, reduction="none").loss == 0
    expected = ((batch.advantages * form.log_ratio) > 0) & (form.kl >= threshold)
    assert 2 <= expected.sum() <= 12
    assert torch.equal(masked, expected)


def test_the_published_difference_of_log_probabilities_would_fail_the_same_test():
    batch = near_policy(1e-9, 1, seed=1)
    form = closed_form("flow_dppo", batch)
    kappa = batch.table.rows(batch.index).kappa[:, None]
    eps, shifted_eps = batch.eps, batch.eps - kappa * (batch.v - batch.v_old).detach()
    constant = math.log(float(batch.table.sigma[1])) + math.log(2 * math.pi) / 2
    new, old = ((-x.square() / 2 - constant).mean(1) for x in (shifted_eps, eps))
    published = new - old
    assert (published - form.log_ratio).abs().max() > 1e-8
    assert (published.sign() != form.log_ratio.sign()).sum() >= 2


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


@pytest.mark.parametrize("clip", [2e-6, 1e-4])
def test_clip_is_decided_where_float32_ratios_are_too_coarse(clip):
    """Log-ratios 1 % inside and outside of either bound: the ratio 1 + 2e-6 is 17 float32 neighbours away from 1."""
    batch = draw_transitions(4, (64,), with_reference=False, clip=clip)
    batch.index.fill_(2)
    kappa = float(batch.table.kappa[2])
    delta = (batch.v.detach() - batch.v_old).double()
    bounds = [0.99 * math.log1p(clip), 1.01 * math.log1p(clip), 0.99 * math.log1p(-clip), 1.01 * math.log1p(-clip)]
    along = torch.tensor(bounds, dtype=torch.float64) / (kappa * delta.square().mean(1)) + kappa / 2
    batch.eps.copy_(along[:, None] * delta)
    batch.advantages.copy_(torch.tensor([1.0, 1, -1, -1]))
    _, grad = value_and_grad(batch, native("flow_grpo"))
    assert grad.any(1).tolist() == [True, False, True, False]


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


# ---------------------------------------------------------------------------------------------------------------------
# Bad transitions

BAD = [
    (name, value)
    for name in ("v", "v_old", "eps", "v_ref", "advantages")
    for value in (float("nan"), float("inf"), -float("inf"))
]
BAD += [(name, 3e38) for name in ("v", "v_old", "eps", "v_ref")]  # finite, but its square is not


def spoil(batch: TransitionBatch, name: str, value: float, row: int) -> TransitionBatch:
    broken = select(batch, slice(None))
    tensor = broken.options[name] if name in broken.options else getattr(broken, name)
    with torch.no_grad():
        tensor[row].view(-1)[-1] = value
    return broken


def assert_one_is_dropped(clean, clean_grad, out, grad, row):
    others = torch.tensor([k for k in range(len(clean.loss)) if k != row], device=grad.device)
    assert out.loss[row] == 0 and not grad[row].any()
    assert torch.equal(out.loss[others], clean.loss[others]) and torch.equal(grad[others], clean_grad[others])
    metrics = out.metrics.as_dict()
    assert metrics["nonfinite_samples"] == 1 and metrics["invalid_steps"] == 0
    assert all(math.isfinite(number) for number in metrics.values())
    assert metrics["loss"] == pytest.approx(clean.loss[others].mean().item(), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("resolve", BOTH.values(), ids=BOTH)
@pytest.mark.parametrize(("loss", "options"), FULL)
@pytest.mark.parametrize(("name", "value"), BAD)
@pytest.mark.parametrize("kl_weight", [0.04, 0.0])
def test_a_bad_transition_is_dropped_and_touches_no_other(name, value, loss, options, kl_weight, resolve, device):
    batch = draw_transitions(4, device=device, **options)
    batch.options["kl_weight"] = kl_weight
    clean, clean_grad = value_and_grad(batch, resolve(loss))
    assert clean.loss.any()
    out, grad = value_and_grad(spoil(batch, name, value, 1), resolve(loss))
    assert_one_is_dropped(clean, clean_grad, out, grad, 1)


@pytest.mark.parametrize("resolve", BOTH.values(), ids=BOTH)
@pytest.mark.parametrize(("loss", "options"), FULL)
@pytest.mark.parametrize("row", [0, 1, 2, 3])
@pytest.mark.parametrize("log_ratio", [95.0, 1e4])
def test_an_overflowing_ratio_is_dropped_whatever_its_advantage(loss, options, row, log_ratio, resolve, device):
    batch = draw_transitions(4, device=device, drift=1.0, **options)
    batch.advantages.copy_(torch.tensor([0.7, -0.7, 0.0, -1e-30]))
    clean, clean_grad = value_and_grad(batch, resolve(loss))
    step = batch.table.rows(batch.index)
    slope = {"flow_cps": 2 * step.sigma * step.c_v, "grpo_guard": step.c_v}.get(loss, step.kappa)
    broken = select(batch, slice(None))
    delta = (batch.v - batch.v_old).detach()[row]
    broken.eps[row] = (log_ratio / (slope[row] * delta.square().mean()) + step.kappa[row]) * delta
    out, grad = value_and_grad(broken, resolve(loss))
    assert_one_is_dropped(clean, clean_grad, out, grad, row)


def test_a_gradient_that_overflows_is_dropped_with_its_loss(device):
    quiet = af.StepTable(shifted(10), noise_level=1e-3)  # kappa^2 / 2 of 10^5
    batch = draw_transitions(3, (64,), device=device, table=quiet, drift=1e-3, with_reference=False, reduction="none")
    clean, clean_grad = value_and_grad(batch, native("flow_dppo"))
    batch.advantages[1] = -1
    kappa = batch.table.rows(batch.index).kappa[1]
    delta = (batch.v - batch.v_old).detach()[1]
    batch.eps[1] = (86 / (kappa * delta.square().mean()) + kappa / 2) * delta  # a ratio of 2e37 is still a number
    out, grad = value_and_grad(batch, native("flow_dppo"))
    assert out.loss[1] == 0 and not grad[1].any() and out.metrics.as_dict()["nonfinite_samples"] == 1
    assert torch.equal(out.loss[[0, 2]], clean.loss[[0, 2]]) and torch.equal(grad[[0, 2]], clean_grad[[0, 2]])


@pytest.mark.parametrize("resolve", BOTH.values(), ids=BOTH)
@pytest.mark.parametrize("name", LOSSES)
def test_a_vanishing_ratio_is_an_ordinary_number(name, resolve, device):
    batch = draw_transitions(2, device=device, drift=1.0, with_reference=False, reduction="none")
    step = batch.table.rows(batch.index)
    slope = {"flow_cps": 2 * step.sigma * step.c_v, "grpo_guard": step.c_v}.get(name, step.kappa)
    delta = (batch.v - batch.v_old).detach()
    batch.eps[0] = -1e4 / (slope[0] * delta[0].square().mean()) * delta[0]
    batch.advantages.fill_(0.5)
    out, grad = value_and_grad(batch, resolve(name))
    assert out.loss[0] == 0 and not grad[0].any() and out.metrics.as_dict()["nonfinite_samples"] == 0


@pytest.mark.parametrize("resolve", BOTH.values(), ids=BOTH)
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    ("step", "reason"),
    [(9, r"a deterministic step \(sigma = 0\)"), (10, "outside the table of 10 steps"), (-1, "outside the table of")],
)
def test_a_step_that_cannot_be_trained_is_named(name, step, reason, resolve):
    batch = draw_transitions(4, table=TABLES[3])  # CPS ends in a deterministic step
    batch.index[3] = step
    sentence = rf"index\[3\] is {step}, {reason}.*; accepted are the stochastic steps 0, 1, 2, 3, 4, 5, 6, 7, 8\."
    with pytest.raises(ValueError, match=sentence):
        resolve(name)(*batch.arguments(), **batch.options)


@pytest.mark.parametrize("name", LOSSES)
def test_where_values_cannot_be_read_such_a_step_is_dropped_and_counted(name, device):
    """On CUDA, and on every device under torch.compile."""
    batch = draw_transitions(5, device=device, table=TABLES[3], reduction="none")
    clean, clean_grad = value_and_grad(batch, native(name))
    batch.index[:3] = torch.tensor([9, 10, -1])
    with torch.no_grad():
        batch.v[0].fill_(float("nan"))  # counts once more, as what it is
    loss = native(name)
    if device == "cpu":
        torch._dynamo.reset()
        loss = torch.compile(loss, fullgraph=True, backend="aot_eager")
    out, grad = value_and_grad(batch, loss)
    assert not out.loss[:3].any() and not grad[:3].any()
    torch.testing.assert_close(out.loss[3:], clean.loss[3:])
    torch.testing.assert_close(grad[3:], clean_grad[3:])
    metrics = out.metrics.as_dict()
    assert metrics["invalid_steps"] == 3 and metrics["nonfinite_samples"] == 1
    assert metrics["loss"] == pytest.approx(clean.loss[3:].mean().item(), rel=1e-5)


@pytest.mark.parametrize("resolve", BOTH.values(), ids=BOTH)
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("shape", [(0, 4), (0, 3, 8, 8), (3, 0), (2, 4, 0)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_empty_batch_and_empty_transitions(name, resolve, shape, reduction, device):
    batch = draw_transitions(shape[0], shape[1:], device=device, reduction=reduction)
    out, grad = value_and_grad(batch, resolve(name))
    assert grad.shape == shape and torch.isfinite(out.loss).all()
    metrics = out.metrics.as_dict()
    assert metrics["nonfinite_samples"] == 0 and all(math.isfinite(number) for number in metrics.values())


# ---------------------------------------------------------------------------------------------------------------------
# Autograd


@pytest.mark.parametrize(("name", "options"), FULL)
def test_gradcheck(name, options):
    batch = draw_transitions(4, (3, 2), torch.float64, drift=0.3, **options)
    assert torch.autograd.gradcheck(
        lambda v: native(name)(v, *batch.arguments()[1:], **batch.options).loss, (batch.v,), nondet_tol=0.0
    )


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_flows_to_v_only(name, device):
    batch = draw_transitions(device=device)
    leaves = [batch.v_old, batch.eps, batch.advantages, batch.options["v_ref"]]
    for leaf in leaves:
        leaf.requires_grad_()
    for resolve in BOTH.values():
        resolve(name)(*batch.arguments(), **batch.options).loss.backward()
        assert all(leaf.grad is None for leaf in leaves) and batch.v.grad is not None


@pytest.mark.parametrize("name", LOSSES)
def test_without_grad_nothing_is_recorded(name, device):
    batch = draw_transitions(device=device)
    with torch.no_grad():
        assert not native(name)(*batch.arguments(), **batch.options).loss.requires_grad
    out = native(name)(batch.v.detach(), *batch.arguments()[1:], **batch.options)
    assert not out.loss.requires_grad and not out.metrics.values.requires_grad


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_only_inputs_and_per_transition_numbers_are_saved(name, options, device):
    batch = draw_transitions(4, (16, 8, 8), device=device, **options)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        native(name)(*batch.arguments(), **batch.options)
    inputs = {x.data_ptr() for x in (batch.v, batch.v_old, batch.eps, batch.options["v_ref"])}
    assert {x.data_ptr() for x in saved} >= inputs
    assert all(x.numel() <= 4 * 3 for x in saved if x.data_ptr() not in inputs)


@pytest.mark.parametrize(("name", "options"), VARIANTS)
@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_forward_is_two_native_launches_and_backward_one(name, options, batch_size, device):
    batch = draw_transitions(batch_size, device=device, **options)
    module = _native.module
    assert module is not None
    module.reset_launch_count()
    out = native(name)(*batch.arguments(), **batch.options)
    assert module.launch_count() == 2
    out.loss.backward()
    assert module.launch_count() == 3


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", LOSSES)
def test_second_derivative_is_refused(name, device):
    batch = draw_transitions(device=device)
    out = native(name)(*batch.arguments(), **batch.options)
    (grad,) = torch.autograd.grad(out.loss, batch.v, create_graph=True)
    with pytest.raises(RuntimeError, match="transition_grad is not implemented"):
        torch.autograd.grad(grad.sum(), batch.v)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_may_be_changed_in_place(name, reduction, device):
    batch = draw_transitions(device=device, reduction=reduction)
    loss = native(name)(*batch.arguments(), **batch.options).loss
    (whole,) = torch.autograd.grad(loss.sum(), batch.v)
    loss = native(name)(*batch.arguments(), **batch.options).loss
    loss /= 4
    (quarter,) = torch.autograd.grad(loss.sum(), batch.v)
    assert torch.equal(quarter, whole / 4)


@pytest.mark.parametrize("name", LOSSES)
def test_loss_scale_reaches_the_gradient_before_its_rounding(name, device):
    batch = draw_transitions(8, (16, 64, 64), torch.float16, device, with_reference=False)
    with torch.no_grad():
        batch.v.copy_(batch.v_old)  # on-policy: nothing is clipped
    batch.advantages.fill_(1e-3)
    scale = 2.0**16
    out = native(name)(*batch.arguments())
    (grad,) = torch.autograd.grad(out.loss * scale, batch.v)
    _, expected = truth(name, batch)
    assert_close_to_truth(grad, expected * scale, 3e-3)  # of subnormals, some
    # Rounded first and scaled later, most of it would be lost.
    assert (expected.half() == 0).double().mean() > 0.5 and (grad != 0).double().mean() > 0.99


@pytest.mark.parametrize("name", LOSSES)
def test_autocast_changes_nothing(name, device):
    batch = draw_transitions(dtype=torch.bfloat16, device=device)
    out, grad = value_and_grad(batch, native(name))
    with torch.autocast(device, torch.bfloat16):
        inside, inside_grad = value_and_grad(batch, native(name))
    assert inside.loss.dtype == torch.float32
    assert torch.equal(out.loss, inside.loss) and torch.equal(grad, inside_grad)


# ---------------------------------------------------------------------------------------------------------------------
# torch.compile, and what only a GPU can show


PREDICTIVE = {"mask": "predictive", "step_size": 0.01, "threshold": 1e-3, "direction": "log_ratio_minus_kl"}


@pytest.mark.parametrize(
    ("resolve", "name", "options"),
    [
        *[(native, name, {}) for name in LOSSES],
        (native, "flow_dppo", PREDICTIVE),
        (native, "flow_grpo", {"kl_convention": "two_sigma_squared"}),
        (reference, "grpo_guard", {}),
        (reference, "flow_dppo", PREDICTIVE),
    ],
)
def test_compiles_without_graph_breaks(resolve, name, options, device):
    batch = draw_transitions(device=device, **options)
    torch._dynamo.reset()
    out, grad = value_and_grad(batch, torch.compile(resolve(name), fullgraph=True, backend="aot_eager"))
    expected, expected_grad = value_and_grad(batch, resolve(name))
    torch.testing.assert_close(out.loss, expected.loss)
    torch.testing.assert_close(out.metrics.values, expected.metrics.values)
    torch.testing.assert_close(grad, expected_grad)


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
def test_compiles_with_inductor(name, device):
    torch.use_deterministic_algorithms(False)
    batch = draw_transitions(device=device)
    torch._dynamo.reset()
    out, grad = value_and_grad(batch, torch.compile(native(name), fullgraph=True))
    expected, expected_grad = value_and_grad(batch, native(name))
    torch.testing.assert_close(out.loss, expected.loss)
    torch.testing.assert_close(grad, expected_grad)
    torch.use_deterministic_algorithms(True)


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_a_training_step_never_waits_for_the_device(name, options):
    batch = draw_transitions(device="cuda", **options)
    native(name)(*batch.arguments(), **batch.options)  # the table's copy is made here
    torch.cuda.set_sync_debug_mode("error")
    try:
        native(name)(*batch.arguments(), **batch.options).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---------------------------------------------------------------------------------------------------------------------
# What the caller is told


@pytest.mark.parametrize("resolve", BOTH.values(), ids=BOTH)
@pytest.mark.parametrize("name", LOSSES)
def test_metrics_say_what_happened(name, resolve, device):
    bound = {"flow_dppo": {"threshold": 1e-3}}.get(name, {"clip": 1e-4})
    # The kernels take no float64 on CUDA.
    dtype = torch.float32 if device == "cuda" and resolve is native else torch.float64
    allowed = {"rel": 1e-9, "abs": 1e-12} if dtype == torch.float64 else {"rel": 1e-3, "abs": 1e-8}
    batch = draw_transitions(8, dtype=dtype, device=device, seed=9, reduction="sum", **bound)
    out = resolve(name)(*batch.arguments(), **batch.options)
    batch = batch.to(torch.float64)
    form = closed_form(name, batch)
    assert out.metrics.values.shape == (len(out.metrics.names),) and out.metrics.values.device.type == device
    numbers = out.metrics.as_dict()
    assert tuple(numbers) == out.metrics.names
    step = batch.table.rows(batch.index, torch.float64)
    kl_ref = step.kappa.square() / 2 * (batch.v.detach() - batch.options["v_ref"]).square().mean((1, 2, 3))
    A = batch.advantages.double()
    away = A * form.log_ratio > 0
    if name == "flow_dppo":
        masked = away & (form.kl > 1e-3)
        policy = torch.where(masked, 0, -A * form.log_ratio.exp())
    else:
        masked = away & (form.log_ratio.abs() > 1e-4)
        weight = -1 / step.dt if name == "grpo_guard" else 1
        policy = weight * torch.where(masked, -A * (1 + 1e-4 * A.sign()), -A * form.log_ratio.exp())
    ratio = form.log_ratio.exp()
    assert 0 < masked.sum() < 8 and -form.log_ratio.min() > form.log_ratio.max()
    expected = {
        "loss": (policy + 0.04 * kl_ref).mean(),
        "policy_term": policy.mean(),
        "unweighted_policy": (policy * -step.dt if name == "grpo_guard" else policy).mean(),
        "mean_log_ratio": form.log_ratio.mean(),
        "mean_kl_old": form.kl.mean(),
        "mean_kl_ref": kl_ref.mean(),
        "mean_advantage": A.mean(),
        "mean_abs_advantage": A.abs().mean(),
        "max_abs_log_ratio": form.log_ratio.abs().max(),
        "masked_samples": masked.sum(),
        "nonfinite_samples": 0,
        "invalid_steps": 0,
        "contrast_alive": 1,
        "approx_kl": form.log_ratio.square().mean() / 2,
        "ratio_mean": ratio.mean(),
        "ratio_std": ratio.std(correction=0),
        "ratio_min": ratio.min(),
        "ratio_max": ratio.max(),
        "clipped_above": 0 if name == "flow_dppo" else (ratio > 1 + 1e-4).double().mean(),
        "clipped_below": 0 if name == "flow_dppo" else (ratio < 1 - 1e-4).double().mean(),
    }
    assert tuple(expected) == tuple(numbers)
    for key, value in expected.items():
        assert numbers[key] == pytest.approx(float(value), **allowed), key


MISUSE = [
    ({"v": torch.randn(4)}, r"v has shape \[4\]; accepted are a batch dimension and at least one more"),
    ({"v": [1.0]}, r"v is a list; accepted is a floating-point torch.Tensor"),
    ({"v_old": torch.randn(4, 5)}, r"v_old has shape \[4, 5\]; accepted is the shape of v, \[4, 6\]"),
    ({"v_old": None}, r"v_old is a NoneType"),
    ({"eps": torch.ones(4, 6, dtype=torch.int64)}, r"eps has dtype torch.int64; accepted are float32"),
    ({"eps": torch.randn(4, 6, device="meta")}, r"eps is on meta; accepted is the device of v, cpu"),
    ({"v_ref": torch.randn(4, 6, 1)}, r"v_ref has shape \[4, 6, 1\]"),
    ({"table": [1.0, 0.0]}, r"table is a list; accepted is a StepTable"),
    ({"index": 3.0}, r"index is 3.0; accepted are the steps 0 to 9 and an int64 or int32 tensor \[\] or \[N\]"),
    ({"index": torch.zeros(4)}, r"index is torch.float32; accepted is an int64 or int32 tensor"),
    ({"index": torch.zeros(3, dtype=torch.int64)}, r"index has shape \[3\]; accepted is one step a transition, \[4\]"),
    ({"index": torch.zeros(4, dtype=torch.int64, device="meta")}, r"index is on meta; accepted is the device of v"),
    ({"index": torch.tensor([0, 1, 10, 2])}, r"index\[2\] is 10, outside the table of 10 steps; accepted are the"),
    ({"advantages": torch.rand(3)}, r"advantages has shape \[3\]"),
    ({"kl_weight": -1.0}, r"kl_weight is -1.0; accepted is a finite number of at least 0"),
    ({"kl_weight": 0.1, "v_ref": None}, r"kl_weight is 0.1 without v_ref; accepted are 0, or v_ref beside it"),
    ({"reduction": "avg"}, r"reduction is 'avg'; accepted are 'mean', 'sum', 'none'"),
]
CLIP_MISUSE = [
    ({"clip": -1e-4}, r"clip is -0.0001; accepted is a finite number of at least 0"),
    ({"clip": 1.0}, r"clip is 1.0; accepted is a number of at least 0 and below 1"),
]
CONVENTION_MISUSE = [({"kl_convention": "approx"}, r"kl_convention is 'approx'; accepted are 'exact', 'dt', 'two_sig")]
OWN_MISUSE = {
    "flow_grpo": CLIP_MISUSE + CONVENTION_MISUSE,
    "flow_cps": CLIP_MISUSE + CONVENTION_MISUSE,
    "grpo_guard": [*CLIP_MISUSE, ({"time_weight": "dt"}, r"time_weight is 'dt'; accepted are 'inverse_dt', 'none'")],
    "flow_dppo": [
        ({"threshold": -1.0}, r"threshold is -1.0; accepted is a finite number of at least 0"),
        ({"direction": "kl"}, r"direction is 'kl'; accepted are 'ratio', 'log_ratio_minus_kl'"),
        ({"mask": "old"}, r"mask is 'old'; accepted are 'current', 'predictive'"),
        ({"mask": "predictive"}, r"step_size is None; accepted is a finite number above 0"),
        ({"mask": "predictive", "step_size": 0.0}, r"step_size is 0.0; accepted is a finite number above 0"),
        ({"step_size": 0.1}, r"step_size is 0.1; accepted with mask 'current' is None"),
    ],
}


@pytest.mark.parametrize("resolve", BOTH.values(), ids=BOTH)
@pytest.mark.parametrize("name", LOSSES)
def test_misuse_is_said_in_a_sentence(name, resolve):
    batch = draw_transitions(4, (6,))
    names = ("v", "v_old", "eps", "table", "index", "advantages")
    arguments = {**dict(zip(names, batch.arguments(), strict=True)), **batch.options}
    for change, sentence in MISUSE + OWN_MISUSE[name]:
        with pytest.raises(ValueError, match=sentence):
            resolve(name)(**{**arguments, **change})


def test_a_table_without_stochastic_steps_says_so():
    batch = draw_transitions(2, (6,), with_reference=False)
    table = af.StepTable(shifted(10), sampler="ode")
    with pytest.raises(ValueError, match=r"accepted are the stochastic steps \(none in this table\)"):
        af.flow_grpo_loss(batch.v, batch.v_old, batch.eps, table, batch.index, batch.advantages)


@pytest.mark.gpu
@pytest.mark.parametrize("name", LOSSES)
def test_float64_on_cuda_is_refused_in_a_sentence(name):
    batch = draw_transitions(2, dtype=torch.float64, device="cuda")
    with pytest.raises(ValueError, match=rf"a latent is float64 on CUDA.*everywhere by .*\.{name}_loss"):
        native(name)(*batch.arguments())


@pytest.mark.parametrize("name", LOSSES)
def test_unknown_device_is_served_by_the_reference(name, monkeypatch):
    batch = draw_transitions()
    expected = value_and_grad(batch, reference(name))
    monkeypatch.setattr(_native, "DEVICES", frozenset())
    monkeypatch.setattr(_native, "_devices_warned_of", set())
    with pytest.warns(RuntimeWarning, match="built without cpu kernels"):
        out, grad = value_and_grad(batch, native(name))
    assert torch.equal(out.loss, expected[0].loss) and torch.equal(grad, expected[1])
