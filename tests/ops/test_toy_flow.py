"""What each sampler does to a distribution (acceptance test 11.9): 1-D Gaussian data with its exact velocity.

x_s = (1 - s) x0 + s e with x0 ~ N(1.5, 0.5^2) is Gaussian, and the velocity E[e - x0 | x_s] is affine in x_s. Every
step is affine too, so a sampler's moments at s = 0 follow from its table without drawing anything.
"""

from __future__ import annotations

import math

import pytest
import torch

import advflow_ext as af
from advflow_ext.testing.transition_strategies import shifted
from tests.ops.transitions import SPACES

MEAN, STD = 1.5, 0.5


def velocity(s: float) -> tuple[float, float]:
    """slope and offset of E[e - x0 | x_s = x]."""
    variance = (1 - s) ** 2 * STD**2 + s**2
    slope = (s - (1 - s) * STD**2) / variance
    return slope, -MEAN - slope * (1 - s) * MEAN


def moments(table: af.StepTable) -> tuple[float, float, float]:
    """Mean and standard deviation at s = 0, and the largest error of the latter on the way."""
    mean, variance, largest = 0.0, 1.0, 0.0
    sigmas = table.sigmas.tolist()
    for k, (c_x, c_v, sigma) in enumerate(zip(*(x.tolist() for x in (table.c_x, table.c_v, table.sigma)), strict=True)):
        slope, offset = velocity(sigmas[k])
        gain = c_x + c_v * slope
        mean, variance = gain * mean + c_v * offset, gain**2 * variance + sigma**2
        s = sigmas[k + 1]
        largest = max(largest, abs(math.sqrt(variance) - math.hypot((1 - s) * STD, s)))
    return mean, math.sqrt(variance), largest


SAMPLERS = {
    "ode": ("ode", 0.0),
    "flow_sde_0.7": ("flow_sde", 0.7),
    "flow_sde_0.8": ("flow_sde", 0.8),
    "dance_sde_0.3": ("dance_sde", 0.3),
    "cps_0.7": ("cps", 0.7),
    "cps_0.8": ("cps", 0.8),
}
STEPS = (10, 40, 200, 1000, 10_000)
# Error of the standard deviation at s = 0, shift 3.
EXPECTED = {
    "ode": (-0.130, -0.035, -0.007, -0.0015, -0.0001),
    "flow_sde_0.7": (-0.076, -0.021, -0.003, -0.0003, 0.0001),
    "flow_sde_0.8": (-0.066, -0.019, -0.003, -0.0005, 0.0),
    "dance_sde_0.3": (-0.115, -0.031, -0.006, -0.0013, -0.0001),
    "cps_0.7": (-0.172, -0.108, -0.085, -0.077, -0.074),
    "cps_0.8": (-0.185, -0.129, -0.106, -0.099, -0.096),
}


def table(name: str, steps: int) -> af.StepTable:
    sampler, level = SAMPLERS[name]
    return af.StepTable(shifted(steps), sampler=sampler, noise_level=level)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("column", range(len(STEPS)))
def test_marginals_at_the_end(name, column):
    mean, std, _ = moments(table(name, STEPS[column]))
    last_digit = 0.5e-4 if STEPS[column] >= 1000 and not name.startswith("cps") else 0.5e-3
    assert abs(std - STD - EXPECTED[name][column]) <= 1.02 * last_digit
    assert abs(mean - MEAN) < 1e-9


@pytest.mark.parametrize("name", ["flow_sde_0.7", "flow_sde_0.8", "dance_sde_0.3"])
def test_flow_sde_and_dance_converge_to_the_data(name):
    errors = [abs(moments(table(name, steps))[1] - STD) for steps in STEPS]
    assert errors[-1] < 2e-4 and errors == sorted(errors, reverse=True)


def test_the_first_steps_of_flow_sde_keep_their_noise():
    """Their sigma does not shrink with T, so the error just below s = 1 stays; it is forgotten later."""
    assert moments(table("flow_sde_0.7", 10_000))[2] == pytest.approx(0.046, abs=1e-3)
    assert moments(table("flow_sde_0.8", 10_000))[2] == pytest.approx(0.072, abs=1e-3)


@pytest.mark.parametrize(("name", "limit"), [("cps_0.7", -0.074), ("cps_0.8", -0.096)])
def test_cps_with_a_fixed_level_does_not_converge(name, limit):
    """It takes predicted noise for noise and redraws the same fraction at every step: diversity is lost for any T."""
    error = moments(table(name, 100_000))[1] - STD
    assert error == pytest.approx(limit, abs=1e-3)


def test_coefficients_preserving_is_another_property():
    """The noise a point of data keeps: exactly none for CPS, a tenth or two for Flow-SDE and Dance."""
    residual = {}
    for name, steps in (("cps_0.7", 10), ("flow_sde_0.7", 10), ("flow_sde_0.7", 40), ("dance_sde_0.3", 10)):
        coefficients = table(name, steps)
        variance = 1.0
        columns = (coefficients.sigmas[:-1], coefficients.c_x, coefficients.c_v, coefficients.sigma)
        for s, c_x, c_v, sigma in zip(*(x.tolist() for x in columns), strict=True):
            variance = (c_x + c_v / s) ** 2 * variance + sigma**2  # e is known: v = (x - x0) / s
        residual[name, steps] = math.sqrt(variance)
    assert residual["cps_0.7", 10] == pytest.approx(0, abs=1e-7)
    assert residual["flow_sde_0.7", 10] == pytest.approx(0.228, abs=1e-3)
    assert residual["flow_sde_0.7", 40] == pytest.approx(0.057, abs=1e-3)
    assert residual["dance_sde_0.3", 10] == pytest.approx(0.157, abs=1e-3)


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
@pytest.mark.parametrize("name", SAMPLERS)
def test_particles_through_sde_step_have_these_moments(space, name, device):
    coefficients = table(name, 10)
    rows, particles = 64, 4096
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(rows, particles, generator=generator, device=device)
    for k, s in enumerate(coefficients.sigmas[:-1].tolist()):
        slope, offset = velocity(s)
        x = space.sde_step(slope * x + offset, x, coefficients, k, generator=generator).x_next
    mean, std, _ = moments(coefficients)
    standard_error = std / math.sqrt(x.numel())
    assert abs(float(x.double().mean()) - mean) < 4 * standard_error
    assert abs(float(x.double().std()) - std) < 4 * standard_error / math.sqrt(2)
