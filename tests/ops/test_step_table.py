"""The coefficients of every sampler (acceptance test 11.1) against the step as each public repository writes it."""

from __future__ import annotations

import math

import pytest
import torch

import advflow_ext as af
from advflow_ext.testing.transition_strategies import shifted


def twice_shifted(steps: int, shift: float = 3.0) -> torch.Tensor:
    """What diffusers' Euler scheduler makes of a static shift: once for its limits, once more for its steps."""
    lowest = shift * 1e-3 / (1 + (shift - 1) * 1e-3)
    s = torch.linspace(1, lowest, steps, dtype=torch.float64)
    return torch.cat([shift * s / (1 + (shift - 1) * s), torch.zeros(1, dtype=torch.float64)])


SCHEDULES = {"once": shifted, "twice": twice_shifted}
SAMPLERS = [("flow_sde", 0.7), ("flow_sde", 0.8), ("dance_sde", 0.3), ("cps", 0.7), ("cps", 0.8)]


def published_step(sampler, level, sigmas, k, x, v):
    """Mean and standard deviation, line by line as released."""
    s, following = float(sigmas[k]), float(sigmas[k + 1])
    dt = following - s
    if sampler == "flow_sde":  # yifan123/flow_grpo, sd3_sde_with_logprob.py
        std_dev_t = math.sqrt(s / (1 - (float(sigmas[1]) if s == 1 else s))) * level
        mean = x * (1 + std_dev_t**2 / (2 * s) * dt) + v * (1 + std_dev_t**2 * (1 - s) / (2 * s)) * dt
        return mean, std_dev_t * math.sqrt(-dt)
    if sampler == "dance_sde":  # XueZeyue/DanceGRPO, train_grpo_flux.py
        pred_original = x - s * v
        score = -(x - pred_original * (1 - s)) / s**2
        return x + dt * v - 0.5 * level**2 * score * dt, level * math.sqrt(-dt)
    # IamCreateAI/FlowCPS, sd3_sde_with_logprob.py
    std_dev_t = following * math.sin(level * math.pi / 2)
    pred_original, pred_noise = x - s * v, x + (1 - s) * v
    return pred_original * (1 - following) + pred_noise * math.sqrt(following**2 - std_dev_t**2), std_dev_t


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize(("sampler", "level"), SAMPLERS)
@pytest.mark.parametrize("steps", [10, 40])
def test_coefficients_are_the_published_step(schedule, sampler, level, steps):
    sigmas = schedule(steps)
    table = af.StepTable(sigmas, sampler=sampler, noise_level=level)
    x, v = torch.randn(2, 100, generator=torch.Generator().manual_seed(0), dtype=torch.float64).unbind()
    for k in range(steps):
        mean, sigma = published_step(sampler, level, sigmas, k, x, v)
        torch.testing.assert_close(table.c_x[k] * x + table.c_v[k] * v, mean, rtol=1e-13, atol=1e-13)
        assert float(table.sigma[k]) == pytest.approx(sigma, rel=1e-13)
    torch.testing.assert_close(table.kappa, table.c_v / table.sigma)
    torch.testing.assert_close(table.dt, sigmas.diff())


def test_schedules_are_those_of_the_two_code_bases():
    once = [1, 0.96429, 0.92308, 0.875, 0.81818, 0.75, 0.66667, 0.5625, 0.42857, 0.25, 0]
    twice = [1, 0.96013, 0.91335, 0.85769, 0.79037, 0.70728, 0.60215, 0.46488, 0.27805, 0.00893, 0]
    for schedule, published in ((shifted, once), (twice_shifted, twice)):
        torch.testing.assert_close(schedule(10), torch.tensor(published, dtype=torch.float64), atol=6e-6, rtol=0)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("steps", [4, 10, 40])
@pytest.mark.parametrize("a", [0.1, 0.7, 1.0])
def test_the_first_flow_sde_step_has_the_noise_level_as_sigma(schedule, steps, a):
    table = af.StepTable(schedule(steps), noise_level=a)
    assert float(table.sigma[0]) == pytest.approx(a, rel=1e-15)
    assert float(table.c_x[0]) == pytest.approx(1 - a**2 / 2, rel=1e-15)
    # On all others c_v is Euler's times one constant.
    torch.testing.assert_close(table.c_v[1:], table.dt[1:] * (1 + a**2 / 2), rtol=1e-13, atol=0)


def test_numbers_of_the_single_shift_schedule():
    """kappa^2 / 2 at noise level 0.8, T = 10."""
    flow = af.StepTable(shifted(10), noise_level=0.8)
    cps = af.StepTable(shifted(10), sampler="cps", noise_level=0.8)
    steps = [0, 1, 2, 3, 4, 6, 8]
    for table, sigma, half_kappa_sq in (
        (flow, [0.8, 0.844, 0.608, 0.505, 0.443, 0.365, 0.293], [1e-3, 2.1e-3, 5.5e-3, 1.1e-2, 2.1e-2, 7.1e-2, 0.32]),
        (
            cps,
            [0.917, 0.878, 0.832, 0.778, 0.713, 0.535, 0.238],
            [7.6e-4, 2.7e-3, 6.5e-3, 1.3e-2, 2.6e-2, 9.5e-2, 0.68],
        ),
    ):
        assert table.sigma[steps].tolist() == pytest.approx(sigma, abs=6e-4)
        assert (table.kappa[steps].square() / 2).tolist() == pytest.approx(half_kappa_sq, rel=0.06)


def test_the_other_convention_at_the_singular_end():
    ours = af.StepTable(shifted(10), noise_level=0.7)
    clamped = af.StepTable(shifted(10), noise_level=0.7, convention="clamp_0.99")
    assert float(clamped.sigma[0]) == pytest.approx(1.32, abs=5e-3)
    # It understates the first KL 3.6 times, and is the same everywhere else.
    assert float(ours.kappa[0] ** 2 / clamped.kappa[0] ** 2) == pytest.approx(3.57, abs=0.01)
    assert torch.equal(ours.sigma[1:], clamped.sigma[1:]) and torch.equal(ours.c_v[1:], clamped.c_v[1:])
    near = torch.tensor([0.995, 0.5, 0.0], dtype=torch.float64)
    assert af.StepTable(near, convention="clamp_0.99").sigma[0] < af.StepTable(near).sigma[0]


@pytest.mark.parametrize("sampler", ["flow_sde", "dance_sde", "cps"])
def test_outside_the_window_a_step_is_euler(sampler):
    whole = af.StepTable(shifted(10), sampler=sampler)
    window = af.StepTable(shifted(10), sampler=sampler, stochastic_steps=[4, 2, 3])
    assert window.stochastic_steps == (2, 3, 4)
    for k in range(10):
        if k in (2, 3, 4):
            assert window.sigma[k] == whole.sigma[k] > 0 and window.c_v[k] == whole.c_v[k]
        else:
            assert (window.c_x[k], window.c_v[k], window.sigma[k]) == (1, window.dt[k], 0)
            assert window.kappa[k] == -math.inf


def test_deterministic_tables_are_euler():
    ode = af.StepTable(shifted(10), sampler="ode", noise_level=0.7)
    assert ode.stochastic_steps == () and not ode.sigma.any()
    for sampler in ("flow_sde", "dance_sde", "cps"):
        silent = af.StepTable(shifted(10), sampler=sampler, noise_level=0.0)
        assert torch.equal(silent.c_v, ode.c_v) and torch.equal(silent.c_x, ode.c_x) and not silent.sigma.any()
    # CPS ends without noise whatever its level.
    assert af.StepTable(shifted(10), sampler="cps").stochastic_steps == tuple(range(9))


def test_rows_are_rounded_once_and_the_copy_is_kept(device):
    table = af.StepTable(shifted(10))
    index = torch.tensor([3, 0, 3, 9], device=device)
    for dtype in (torch.float32, torch.float64):
        rows = table.rows(index, dtype)
        for name, column in zip(rows._fields, rows, strict=True):
            assert column.device.type == device and column.dtype == dtype
            assert torch.equal(column.cpu(), getattr(table, name)[index.cpu()].to(dtype))
    assert len(table._copies) == 2
    first = table._copies[index.device, torch.float32].data_ptr()
    table.rows(index)
    assert table._copies[index.device, torch.float32].data_ptr() == first


def test_a_step_outside_the_table_is_no_number(device):
    table = af.StepTable(shifted(10))
    rows = table.rows(torch.tensor([-1, 10, 2**40, 4], device=device))
    for column in rows:
        assert column.isnan().tolist() == [True, True, True, False]


@pytest.mark.gpu
def test_rows_never_wait_for_the_device():
    table = af.StepTable(shifted(10))
    index = torch.tensor([0, 11, 3], device="cuda")
    table.rows(index)
    torch.cuda.set_sync_debug_mode("error")
    try:
        table.rows(index)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_sigmas_may_come_as_anything_that_holds_numbers():
    numbers = [1.0, 0.5, 0.25, 0.0]
    expected = af.StepTable(numbers)
    for sigmas in (tuple(numbers), torch.tensor(numbers), torch.tensor(numbers, requires_grad=True)):
        assert torch.equal(af.StepTable(sigmas).c_v, expected.c_v)
    given = torch.tensor(numbers, dtype=torch.float64)
    table = af.StepTable(given)
    given.zero_()
    assert table.sigmas.tolist() == numbers


def test_repr():
    table = af.StepTable(shifted(4), sampler="cps", noise_level=0.8, stochastic_steps=(1, 3))
    assert repr(table) == "StepTable(sampler='cps', noise_level=0.8, steps=4, stochastic_steps=[1])"


GOOD = [1.0, 0.5, 0.0]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"sigmas": [1.0]}, r"sigmas has shape \[1\]; accepted are \[T \+ 1\] numbers, T of at least 1"),
        ({"sigmas": [[1.0, 0.0]]}, r"sigmas has shape \[1, 2\]"),
        ({"sigmas": "1,0"}, r"sigmas is '1,0'; accepted are \[T \+ 1\] numbers"),
        ({"sigmas": [1.0, 0.5, 0.5]}, r"sigmas is \[1.0, 0.5, 0.5\]; accepted are numbers within \[0, 1\], strictly"),
        ({"sigmas": [0.0, 0.5, 1.0]}, r"sigmas is \[0.0, 0.5, 1.0\]"),
        ({"sigmas": [1000.0, 500.0, 0.0]}, r"sigmas is \[1000.0, 500.0, 0.0\]; accepted are numbers within"),
        ({"sigmas": [1.0, math.nan, 0.0]}, r"sigmas is \[1.0, nan, 0.0\]"),
        ({"sigmas": [0.5, 0.2, -0.1]}, r"sigmas is \[0.5, 0.2, -0.1\]"),
        ({"sampler": "ddpm"}, r"sampler is 'ddpm'; accepted are 'flow_sde', 'dance_sde', 'cps', 'ode'"),
        ({"noise_level": -0.1}, r"noise_level is -0.1; accepted is a finite number of at least 0"),
        ({"noise_level": 1.1, "sampler": "cps"}, r"noise_level is 1.1; accepted for sampler 'cps'"),
        ({"convention": "0.99"}, r"convention is '0.99'; accepted are 'next_sigma', 'clamp_0.99'"),
        ({"stochastic_steps": [0, 2]}, r"stochastic_steps has 2; accepted are the steps 0 to 1, or None"),
        ({"stochastic_steps": [-1]}, r"stochastic_steps has -1"),
        ({"stochastic_steps": [True]}, r"stochastic_steps has True"),
        ({"stochastic_steps": [0.0]}, r"stochastic_steps has 0.0"),
        ({"stochastic_steps": 1}, r"stochastic_steps is 1; accepted are the steps 0 to 1, or None"),
    ],
)
def test_misuse_is_said_in_a_sentence(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        af.StepTable(**{"sigmas": GOOD, **arguments})
