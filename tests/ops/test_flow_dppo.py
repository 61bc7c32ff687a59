"""The mask of Flow-DPPO: its truth table (acceptance test 11.4) and its two refinements."""

from __future__ import annotations

import math

import pytest
import torch

from advflow_ext.testing import assert_close_to_truth
from advflow_ext.testing.transition_strategies import TABLES, TransitionBatch
from tests.ops.transitions import BOTH, draw_transitions, native, value_and_grad

pytestmark = pytest.mark.usefixtures("poisoned_memory")

both = pytest.mark.parametrize("dppo", [resolve("flow_dppo") for resolve in BOTH.values()], ids=BOTH)
STEP = 3


def aimed(log_ratio: list[float], kl: list[float], advantages: list[float], dtype=torch.float64, **options):
    """Transitions with these log-ratios and mean-reduced KLs: eps lies along v - v_old, whose length is set."""
    batch = draw_transitions(len(kl), (32,), dtype, with_reference=False, reduction="none", **options)
    batch.index.fill_(STEP)
    kappa = float(TABLES[0].kappa[STEP])
    delta = (batch.v - batch.v_old).detach().double()
    wanted = torch.tensor(kl, dtype=torch.float64)
    delta *= (2 * wanted / delta.square().mean(1)).sqrt()[:, None] / abs(kappa)
    along = (torch.tensor(log_ratio, dtype=torch.float64) + wanted) / (kappa * delta.square().mean(1))
    with torch.no_grad():
        batch.v.copy_(batch.v_old + delta)
    batch.eps.copy_(along[:, None] * delta)
    batch.advantages.copy_(torch.tensor(advantages))
    return batch


def masked(batch: TransitionBatch, dppo, **options) -> list[bool]:
    """Which transitions have neither loss nor gradient, checked against the count in the metrics."""
    out, grad = value_and_grad(TransitionBatch(*batch.arguments(), {**batch.options, **options}), dppo)
    ratio_term = batch.advantages != 0
    gone = ~grad.flatten(1).any(1) & ratio_term
    assert torch.equal(gone, (out.loss == 0) & ratio_term)
    assert out.metrics.as_dict()["masked_samples"] == gone.sum()
    return gone.tolist()


# ---------------------------------------------------------------------------------------------------------------------
# Acceptance test 11.4

SMALL, LARGE = 1e-7, 1e-5
TABLE = [
    # A, log r, KL, dropped
    (1.0, 1e-5, SMALL, False),
    (1.0, -1e-5, SMALL, False),
    (1.0, 1e-5, LARGE, True),
    (1.0, -1e-5, LARGE, False),  # corrective
    (-1.0, 1e-5, SMALL, False),
    (-1.0, -1e-5, SMALL, False),
    (-1.0, 1e-5, LARGE, False),  # corrective
    (-1.0, -1e-5, LARGE, True),
    (0.0, 1e-5, LARGE, False),
    (0.0, -1e-5, LARGE, False),
    (1e-42, 1e-5, LARGE, True),  # the product A log r underflows in float32
    (-1e-42, -1e-5, LARGE, True),
]


@both
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_truth_table(dppo, dtype):
    if dtype == torch.float32 and dppo is not native("flow_dppo"):
        pytest.skip("a float32 difference of log-probabilities has no sign at 1e-5 of 32 elements")
    advantages, log_ratio, kl, expected = (list(column) for column in zip(*TABLE, strict=True))
    assert masked(aimed(log_ratio, kl, advantages, dtype), dppo, threshold=1e-6) == expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_ratio_of_exactly_one_is_kept_far_away(dtype):
    kappa = TABLES[0].rows(torch.tensor([STEP]), dtype).kappa
    # v - v_old = 1/4 and eps = kappa / 8 make both terms of the log-ratio the same product, bit for bit.
    batch = TransitionBatch(
        torch.full((2, 16), 0.25, dtype=dtype).requires_grad_(), torch.zeros(2, 16, dtype=dtype),
        (kappa / 8).expand(2, 16), TABLES[0], torch.tensor([STEP, STEP]), torch.tensor([1.0, -1.0]),
        {"reduction": "none", "threshold": 0.0},
    )  # fmt: skip
    out, grad = value_and_grad(batch, native("flow_dppo"))
    numbers = out.metrics.as_dict()
    assert numbers["max_abs_log_ratio"] == 0 and numbers["mean_kl_old"] > 1e-4
    assert out.loss.tolist() == [-1, 1] and grad.any(1).all() and numbers["masked_samples"] == 0


@both
def test_on_policy_a_threshold_of_zero_drops_nothing(dppo):
    batch = draw_transitions(4, with_reference=False, threshold=0.0, reduction="none")
    with torch.no_grad():
        batch.v.copy_(batch.v_old)
    out, _ = value_and_grad(batch, dppo)
    assert torch.equal(out.loss, -batch.advantages) and out.metrics.as_dict()["masked_samples"] == 0


@both
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_divergence_equal_to_the_threshold_counts_as_large(dppo, dtype):
    batch = aimed([1e-2], [LARGE], [1.0], dtype)
    measured = dppo(*batch.arguments(), threshold=1.0).metrics.as_dict()["mean_kl_old"]
    assert masked(batch, dppo, threshold=measured) == [True]
    assert masked(batch, dppo, threshold=measured * (1 + 1e-6)) == [False]


@both
@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_passes_no_mask(dppo, value, advantage):
    """A NaN fails every comparison: as a divergence it would be large, as a ratio it would point nowhere."""
    batch = aimed([1e-5, 1e-5], [LARGE, LARGE], [advantage, advantage], threshold=1e-6)
    batch.eps[0, 3] = value
    out, grad = value_and_grad(batch, dppo)
    assert out.loss[0] == 0 and torch.isfinite(grad).all() and not grad[0].any()
    numbers = out.metrics.as_dict()
    assert numbers["nonfinite_samples"] == 1 and numbers["masked_samples"] == (advantage > 0)


@both
def test_a_masked_overflow_has_no_gradient(dppo):
    batch = aimed([1e3, 0.0], [1.0, SMALL], [1.0, 1.0], threshold=1e-6)
    batch = batch.to(torch.float32)
    out, grad = value_and_grad(batch, dppo)
    assert out.loss[0] == 0 and torch.isfinite(grad).all() and not grad[0].any() and grad[1].any()


@both
def test_masked_transitions_stay_in_the_mean(dppo):
    batch = aimed([1e-5] * 4, [LARGE, SMALL, LARGE, SMALL], [1.0] * 4)
    batch.options = {"threshold": 1e-6, "reduction": "mean"}
    assert dppo(*batch.arguments(), **batch.options).loss.item() == pytest.approx(-0.5, rel=1e-4)


@both
def test_the_reference_term_is_not_masked(dppo):
    batch = aimed([1e-5, 1e-5], [LARGE, SMALL], [1.0, 1.0], threshold=1e-6)
    v_ref = batch.v.detach() + 0.1
    out, grad = value_and_grad(
        TransitionBatch(*batch.arguments(), {**batch.options, "v_ref": v_ref, "kl_weight": 0.3}), dppo
    )
    kappa = float(TABLES[0].kappa[STEP])
    assert out.loss[0].item() == pytest.approx(0.3 * kappa**2 / 2 * 0.01, rel=1e-9)
    assert_close_to_truth(grad[0], 0.3 * kappa**2 / 32 * (batch.v.detach() - v_ref)[0], 1e-9)


# ---------------------------------------------------------------------------------------------------------------------
# Appendix E


@both
def test_direction_by_log_ratio_minus_kl(dppo):
    """Between 0 and KL the ratio still rises while the divergence falls."""
    batch = aimed([0.5e-5, 0.5e-5, 2e-5, -1e-5], [LARGE] * 4, [1.0, -1.0, 1.0, -1.0])
    assert masked(batch, dppo, threshold=1e-6) == [True, False, True, True]
    assert masked(batch, dppo, threshold=1e-6, direction="log_ratio_minus_kl") == [False, True, True, True]


@both
def test_the_predictive_mask_looks_one_step_ahead(dppo):
    kl, threshold = 0.5e-6, 1e-6
    batch = aimed([1e-3, 1e-3, -1e-3], [kl, kl, kl], [1.0, -1.0, 1.0])
    assert masked(batch, dppo, threshold=threshold) == [False] * 3
    # s (log r - KL) is what a short step adds: with s = 1e-3 it brings the first to 1.5e-6.
    variance = float(TABLES[0].sigma[STEP]) ** 2
    ahead = {"threshold": threshold, "mask": "predictive", "step_size": 1e-3 * variance}
    assert masked(batch, dppo, **ahead) == [True, False, False]
    assert masked(batch, dppo, **{**ahead, "step_size": 1e-5 * variance}) == [False] * 3


@pytest.mark.parametrize("step_size", [1e-4, 1e-2, 1.0])
def test_equation_24_is_the_divergence_after_the_step(step_size):
    """The threshold at which the mask flips, found by bisection, is the KL of the mean moved by hand."""
    batch = draw_transitions(1, (48,), torch.float64, with_reference=False, drift=0.3)
    step = batch.table.rows(batch.index, torch.float64)
    delta = (batch.v - batch.v_old).detach()
    batch.eps.copy_(batch.eps.abs() * (step.kappa * delta).sign())  # log r > 0
    batch.advantages.fill_(0.75)
    mu_old, mu = torch.zeros(48), step.c_v * delta[0]
    x_next = mu_old + step.sigma * batch.eps[0]
    log_ratio = ((x_next - mu_old).square() - (x_next - mu).square()).mean() / (2 * step.sigma**2)
    assert log_ratio > 0
    moved = mu + step_size * 0.75 * log_ratio.exp() * (x_next - mu) / step.sigma**2
    expected = float((moved - mu_old).square().mean() / (2 * step.sigma**2))
    low, high = 0.0, 1e9
    for _ in range(100):
        middle = (low + high) / 2
        drops = native("flow_dppo")(*batch.arguments(), threshold=middle, mask="predictive", step_size=step_size).loss
        low, high = (middle, high) if drops == 0 else (low, middle)
    assert math.isclose(low, expected, rel_tol=1e-9)


@both
def test_a_predicted_divergence_that_overflows_is_large(dppo):
    # In the last, an infinite approach and an infinite overshoot make NaN.
    batch = aimed([1e-3, -1e-3, 0.5e-5], [SMALL, SMALL, LARGE], [1.0, 1.0, 1.0]).to(torch.float32)
    assert masked(batch, dppo, mask="predictive", step_size=3e38) == [True, False, True]
