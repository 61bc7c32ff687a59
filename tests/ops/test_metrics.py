"""Metrics that trainers log of a ratio, whether the contrast is alive, and gradients that overflow alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import advflow_ext as af
from advflow_ext.doctor.every_op import FORWARD, REVERSE, Drawing, run

SPACES = {"native": af, "reference": af.reference}
each_space = pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
LOSSES = (*FORWARD, *REVERSE)


def metrics(name: str, space: Any, given: dict[str, Any]) -> dict[str, float]:
    return getattr(space, name)(**given).metrics.as_dict()


@each_space
@pytest.mark.parametrize("name", REVERSE)
@pytest.mark.parametrize("clip", [0.3, (0.4, 0.05)])
def test_a_ratio_is_reported_as_trainers_log_it(space, name, clip):
    given = Drawing((9, 3, 5), torch.float64, "cpu").inputs(name)
    rows = given["table"].rows(given["index"], torch.float64)
    delta = (given["v"] - given["v_old"]).detach().flatten(1)
    eps = given["eps"].flatten(1)
    true = rows.kappa * (eps * delta).mean(1) - rows.kappa.square() / 2 * delta.square().mean(1)
    log_ratio = {
        "flow_cps_loss": 2 * rows.sigma.square() * true,
        "grpo_guard_loss": rows.c_v * (eps * delta).mean(1),
    }.get(name, true)
    ratio = log_ratio.exp()
    below, above = (0.0, 0.0)
    if name != "flow_dppo_loss":
        low, high = clip if isinstance(clip, tuple) else (clip, clip)
        given["clip"] = clip
        above, below = float((ratio > 1 + high).double().mean()), float((ratio < 1 - low).double().mean())
    found = metrics(name, space, given)
    expected = {
        "approx_kl": float(log_ratio.square().mean() / 2),
        "clipped_above": above,
        "clipped_below": below,
        "ratio_mean": float(ratio.mean()),
        "ratio_std": float(ratio.std(correction=0)),
        "ratio_min": float(ratio.min()),
        "ratio_max": float(ratio.max()),
        "contrast_alive": 1.0,
    }
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-9, abs=1e-12), key


@each_space
def test_a_ratio_near_1_keeps_its_digits(space):
    """float32, where the ratio itself is 1 to all digits but one."""
    given = Drawing((64, 8, 16, 16), torch.float32, "cpu").inputs("flow_grpo_loss")
    given["v"] = (given["v_old"] + 1e-4 * torch.randn(given["v"].shape)).detach().requires_grad_()
    wide = {key: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
            for key, value in given.items()}  # fmt: skip
    found, expected = metrics("flow_grpo_loss", space, given), metrics("flow_grpo_loss", af.reference, wide)
    if space is af:
        for key in ("approx_kl", "ratio_std"):
            assert found[key] == pytest.approx(expected[key], rel=2e-3), key
    assert 0 < expected["ratio_std"] < 1e-4


@each_space
@pytest.mark.parametrize("name", REVERSE)
def test_the_policy_term_is_reported_before_its_weights_too(space, name):
    given = Drawing((6, 3, 5), torch.float32, "cpu").inputs(name)
    plain = metrics(name, space, given | {"time_weight": "none"})
    weighted = metrics(name, space, given | {"time_weight": "none", "policy_weight": 3.0})
    assert weighted["unweighted_policy"] == plain["unweighted_policy"] == pytest.approx(plain["policy_term"], rel=1e-6)
    assert weighted["policy_term"] == pytest.approx(3 * plain["policy_term"], rel=1e-6)


@each_space
@pytest.mark.parametrize("name", [name for name in LOSSES if name != "reward_weighted_loss"])
def test_the_contrast_counts_samples_that_moved(space, name):
    given = Drawing((4, 3, 5), torch.float32, "cpu").inputs(name)
    anchor = "v_ema" if name == "awm_loss" else "v_old"
    assert metrics(name, space, given)["contrast_alive"] == 1
    given[anchor] = given[anchor].clone()
    given[anchor][1:] = given["v"].detach()[1:]
    assert metrics(name, space, given)["contrast_alive"] == 0.25
    given[anchor][0] = given["v"].detach()[0]
    assert metrics(name, space, given)["contrast_alive"] == 0


@each_space
def test_awm_reports_its_ratio(space):
    given = Drawing((6, 3, 5), torch.float64, "cpu").inputs("awm_loss")
    log_ratio = af.awm_log_prob(*(given[key].detach() for key in ("v", "x0", "noise", "t"))) - given["log_prob_old"]
    found = metrics("awm_loss", space, given | {"clip": (0.2, 0.1)})
    assert found["approx_kl"] == pytest.approx(float(log_ratio.square().mean() / 2), rel=1e-9)
    assert found["ratio_max"] == pytest.approx(float(log_ratio.exp().max()), rel=1e-9)
    assert found["clipped_above"] == pytest.approx(float((log_ratio.exp() > 1.1).double().mean()))
    assert found["clipped_below"] == pytest.approx(float((log_ratio.exp() < 0.8).double().mean()))


@each_space
@pytest.mark.parametrize("name", [*REVERSE, "awm_loss"])
def test_dropped_samples_have_no_part_in_a_ratio(space, name):
    given = Drawing((5, 3, 5), torch.float64, "cpu").inputs(name)
    whole = metrics(
        name, space, {key: value[:4] if isinstance(value, torch.Tensor) else value for key, value in given.items()}
    )
    given["v"] = given["v"].detach().clone()
    given["v"][4] = math.nan
    found = metrics(name, space, given)
    for key in ("approx_kl", "ratio_mean", "ratio_std", "ratio_min", "ratio_max", "contrast_alive"):
        assert found[key] == pytest.approx(whole[key], rel=1e-12), key


@each_space
@pytest.mark.parametrize("name", [*REVERSE, "awm_loss"])
def test_the_ratio_of_nobody_is_1(space, name):
    given = Drawing((2, 3, 5), torch.float32, "cpu").inputs(name)
    given["v"] = torch.full_like(given["v"], math.nan)
    found = metrics(name, space, given)
    assert [found[f"ratio_{what}"] for what in ("mean", "std", "min", "max")] == [1, 0, 1, 1]
    assert (found["approx_kl"], found["contrast_alive"]) == (0, 0)


@each_space
def test_a_ratio_beyond_float32_keeps_the_metrics_finite(space):
    given = Drawing((3, 3, 5), torch.float32, "cpu").inputs("awm_loss")
    given["advantages"] = torch.ones(3)  # clipped above, so that the sample stays
    given["log_prob_old"] = torch.tensor([-200.0, -0.1, -0.1])
    found = metrics("awm_loss", space, given)
    assert found["nonfinite_samples"] == 0 and all(math.isfinite(number) for number in found.values())
    assert found["ratio_max"] == pytest.approx(math.exp(80), rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Gradients that overflow where their loss does not


@each_space
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("size", [1, 15, 4099])
@pytest.mark.parametrize("value", [3e38, -3e38, 1e37])
def test_a_gradient_is_finite_or_its_sample_is_dropped(space, name, size, value):
    given = Drawing((4, size), torch.float32, "cpu").inputs(name)
    score = "rewards" if name == "reward_weighted_loss" else "advantages"
    more = {
        "awm_loss": [{"weighting": weighting} for weighting in ("uniform", "t", "huber", "adaptive")],
        "flow_awr_loss": [{"weighting": weighting} for weighting in ("adaptive", "prediction", "velocity")],
        "advantage_flow_loss": [{"weighting": weighting} for weighting in ("adaptive", "velocity")],
        "reward_weighted_loss": [{"method": "linear"}],
    }.get(name, [{}])
    for options in more:
        clean = run(name, given | options, space)
        broken = {key: tensor.detach().clone().requires_grad_(tensor.requires_grad) if isinstance(tensor, torch.Tensor)
                  else tensor for key, tensor in (given | options).items()}  # fmt: skip
        with torch.no_grad():
            broken[score][1] = value
        outputs = run(name, broken, space)
        assert outputs["values"].isfinite().all() and outputs["grad_v"].isfinite().all(), options
        numbers = getattr(space, name)(**broken).metrics.as_dict()
        if numbers["nonfinite_samples"]:
            assert outputs["values"][1] == 0 and not outputs["grad_v"][1].any(), options
        others = torch.tensor([0, 2, 3])
        assert torch.equal(outputs["grad_v"][others], clean["grad_v"][others]), options


@each_space
def test_awm_of_the_largest_advantage_is_dropped_and_counted(space):
    v = torch.tensor([[2.0], [2.0]], requires_grad=True)
    zero, t = torch.zeros(2, 1), torch.ones(2)
    out = space.awm_loss(v, zero, zero, t, torch.tensor([3e38, 1.0]), weighting="uniform", reduction="none")
    (grad,) = torch.autograd.grad(out.loss.sum(), v)
    assert out.loss.tolist() == [0.0, -1.0] and grad.tolist() == [[0.0], [4.0]]
    assert out.metrics.as_dict()["nonfinite_samples"] == 1


@each_space
def test_half_precision_gradients_have_their_own_limit(space):
    v = torch.tensor([[2.0], [2.0]], dtype=torch.float16, requires_grad=True)
    zero, t = torch.zeros(2, 1), torch.ones(2)
    out = space.awm_loss(v, zero, zero, t, torch.tensor([3e4, 1e4]), weighting="uniform", reduction="none")
    (grad,) = torch.autograd.grad(out.loss.sum(), v)
    assert out.loss.tolist() == [0.0, -1e4] and grad.tolist() == [[0.0], [4e4]]
