"""`advantage_flow.gamma auto`: where it goes, and that no sample is left without a minimum."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from advflow.algorithms import make_algorithm
from advflow.algorithms.batch import ForwardBatch
from advflow.control.gamma import GammaControl
from advflow.run.checkpoint import load_checkpoint, save_checkpoint
from advflow.run.trainer import Trainer
from advflow.settings.config import TrainConfig
from advflow.settings.methods import AdvantageFlowConfig
from advflow.settings.optim import OptimConfig, RolloutPolicyConfig

import advflow_ext as af

Make = Callable[..., TrainConfig]


def measured(move: float, rho: float, target_error: float = 0.5) -> dict[str, float]:
    """The metrics of a learner that goes so far in every iteration, with a rollout policy that follows it."""
    return {"rollout_deviation": (move * rho / (1 - rho)) ** 2 * target_error, "target_error": target_error}


def test_gamma_grows_where_the_learner_goes_too_far_and_shrinks_where_it_does_not() -> None:
    control = GammaControl(0.04)
    row = control.update(measured(0.04 * 1.2, 0.5), rho=0.5, rate=1.0)
    assert row == {"gamma": 0.5, "learner_move": pytest.approx(0.048)}
    assert control.gamma == pytest.approx(0.5 * 1.2**0.1)
    control.update(measured(0.04 / 1.2, 0.2, target_error=3.0), rho=0.2, rate=1.0)  # the same length in other units
    assert control.gamma == pytest.approx(0.5)
    control.update(measured(0.004, 0.5), rho=0.5, rate=0.1)  # a tenth of the rate goes a tenth of the way
    assert control.gamma == pytest.approx(0.5)


def test_gamma_moves_by_a_bounded_factor_within_bounds() -> None:
    control = GammaControl(0.04)
    control.update(measured(4e4, 0.5), rho=0.5, rate=1.0)
    assert control.gamma == pytest.approx(0.5 * math.exp(0.1))
    for move, bound in ((4e4, 10.0), (4e-9, 0.1)):
        for _ in range(80):
            control.update(measured(move, 0.5), rho=0.5, rate=1.0)
        assert control.gamma == bound


@pytest.mark.parametrize(
    ("first", "rho", "rate"),
    [
        (measured(1.0, 0.19), 0.19, 1.0),  # a rollout policy that has all but become the learner
        (measured(0.0, 0.5), 0.5, 1.0),  # no usable sample
        ({"rollout_deviation": math.nan, "target_error": math.nan}, 0.5, 1.0),
        ({"rollout_deviation": math.inf, "target_error": math.inf}, 0.5, 1.0),
        ({"rollout_deviation": 1.0, "target_error": math.inf}, 0.5, 1.0),
        ({"rollout_deviation": math.inf, "target_error": 1.0}, 0.5, 1.0),
        ({"rollout_deviation": 1.0, "target_error": 0.0}, 0.5, 1.0),
        (measured(1.0, 0.5), 0.5, 0.0),
    ],
)
def test_nothing_measured_is_nothing_concluded(first: dict[str, float], rho: float, rate: float) -> None:
    control = GammaControl(0.04)
    assert control.update(first, rho, rate) == {"gamma": 0.5} and control.gamma == 0.5


@pytest.mark.parametrize(("deviation", "target_error", "led"), [(1e-300, 1e300, -0.1), (1e300, 1e-300, 0.1)])
def test_any_two_numbers_that_are_measured_are_taken(deviation: float, target_error: float, led: float) -> None:
    control = GammaControl(0.04)
    control.update({"rollout_deviation": deviation, "target_error": target_error}, rho=0.5, rate=1.0)
    assert control.gamma == pytest.approx(0.5 * math.exp(led))


@pytest.mark.parametrize(
    ("policy", "sentence"),
    [
        ({"rate": 0.0}, r'rollout_policy.rate is 0.0; accepted: a positive number with advantage_flow.gamma "auto"'),
        ({"maximum": 0.19}, r'rollout_policy.maximum is 0.19; accepted: 0.2 or more with advantage_flow.gamma "auto"'),
    ],
)
def test_a_rollout_policy_that_never_keeps_a_fifth_is_refused(
    small_config: Make, policy: dict[str, float], sentence: str
) -> None:
    auto, chosen = AdvantageFlowConfig(gamma="auto"), RolloutPolicyConfig(**policy)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=sentence):
        small_config(advantage_flow=auto, rollout_policy=chosen)
    small_config(rollout_policy=chosen)
    small_config(algorithm="awm", advantage_flow=auto, rollout_policy=chosen)
    small_config(advantage_flow=auto, rollout_policy=RolloutPolicyConfig(maximum=0.2))


def test_it_settles_where_the_target_is_met() -> None:
    """A learner whose way is shorter the larger gamma is, as measured: by half for five times gamma."""
    control = GammaControl(0.04)
    for _ in range(200):
        control.update(measured(0.05 * control.gamma**-0.4, 0.5), rho=0.5, rate=1.0)
    assert control.gamma == pytest.approx((0.05 / 0.04) ** 2.5, rel=0.02)


@pytest.mark.parametrize("chosen", [0.1, 0.5, 5.0])
@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_no_sample_is_left_without_a_minimum(chosen: float, beta: float) -> None:
    rng = torch.Generator().manual_seed(0)
    v, v_old, v_ref, x0, noise = torch.randn(5, 6, 8, generator=rng).unbind()
    t, A = torch.linspace(0.1, 0.9, 6), torch.tensor([-1.0, -0.5, -0.05, 0.4, 1.0, math.nan])
    settings = AdvantageFlowConfig(gamma="auto", lam=0.02, beta=beta, offset=0.1)
    batch = ForwardBatch(v, v_old, v_ref, x0, noise, t, A, A, 6, 2.0, chosen)
    out = make_algorithm("advantage_flow", settings).loss(batch)
    scale = 0.5 / chosen
    curvatures = scale * (beta * (A + 0.1) + chosen + 0.04)[:5].clamp(min=0.1)
    metrics = out.metrics.as_dict()
    assert metrics["min_curvature"] == pytest.approx(curvatures.min().item(), abs=1e-6)
    assert metrics["nonconvex_samples"] == 0 and metrics["nonfinite_samples"] == 1
    gamma = chosen if chosen == 5.0 else (0.1 - beta * (A + 0.1) - 0.04).nan_to_num().clamp(min=chosen)
    expected = af.advantage_flow_loss(
        v, x0, noise, t, A + 0.1, v_old=v_old, v_ref=v_ref, gamma=gamma, lam=0.04, beta=beta
    )
    torch.testing.assert_close(out.loss, scale * expected.loss, rtol=1e-5, atol=1e-7)


def test_the_way_that_is_measured_is_the_learner_s_and_a_checkpoint_holds_where_it_led(
    small_config: Make, tmp_path: Path
) -> None:
    """From the rollout policy before it followed by a half, on the next iteration's images."""
    trainer = Trainer(
        small_config(
            advantage_flow=AdvantageFlowConfig(gamma="auto", target_move=1e-3),
            optim=OptimConfig(micro_batch=12, warmup=0),
            rollout_policy=RolloutPolicyConfig(rate=1.0),
        )
    )
    rows = [trainer.iterate(iteration) for iteration in range(2)]
    assert rows[0]["gamma"] == rows[1]["gamma"] == 0.5 and "learner_move" not in rows[0]
    expected = math.sqrt(rows[1]["rollout_deviation"] / rows[1]["target_error"])  # with a rho of a half
    assert rows[1]["learner_move"] == pytest.approx(expected)
    saved = save_checkpoint(tmp_path, 2, trainer.parts)
    whole = trainer.iterate(2)
    assert trainer.gamma_control is not None and trainer.gamma_control.gamma > whole["gamma"]
    assert load_checkpoint(saved, trainer.parts) == 2
    resumed = trainer.iterate(2)
    assert resumed["gamma"] == whole["gamma"] == pytest.approx(0.5 * math.exp(0.1))  # a small target was asked for
    assert resumed["loss"] == whole["loss"] and resumed["learner_move"] == whole["learner_move"]
