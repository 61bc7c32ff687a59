"""The coefficients of every sampler (acceptance test 11.1) against the step as each public repository writes it."""

from __future__ import annotations

import math
import re
from itertools import product

import pytest
import torch

import advflow_ext as af
from advflow_ext.testing.transition_strategies import shifted
from tests.contract.published_steps import SAMPLERS, SCHEDULES, published_step, same_rows, twice_shifted


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
    clamped, ours = (af.StepTable(near, noise_level=0.1, convention=name) for name in ("clamp_0.99", "next_sigma"))
    assert clamped.sigma[0] < ours.sigma[0]


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
    assert [copied.type for _, copied, _ in table._copies].count(device) == 2
    first = table._copies["_rows", index.device, torch.float32].data_ptr()
    table.rows(index)
    assert table._copies["_rows", index.device, torch.float32].data_ptr() == first


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


# ---------------------------------------------------------------------------------------------------------------------
# The ends of a schedule


@pytest.mark.parametrize(("sampler", "level"), SAMPLERS)
@pytest.mark.parametrize("first", [0.9999998807907104, 1.0000001192092896, 0.999999, 0.9999989867210388, 1.000001])
def test_a_first_sigma_of_1_up_to_rounding_is_1(sampler, level, first):
    rest = shifted(10)[1:].tolist()
    table = af.StepTable([first, *rest], sampler=sampler, noise_level=level)
    assert same_rows(table, af.StepTable([1.0, *rest], sampler=sampler, noise_level=level))
    assert same_rows(
        af.StepTable.from_steps([0.5, first], [0.2, rest[0]], sampler=sampler, noise_level=level, sigma_1=rest[0]),
        af.StepTable.from_steps([0.5, 1.0], [0.2, rest[0]], sampler=sampler, noise_level=level, sigma_1=rest[0]),
    )
    if sampler == "flow_sde":
        assert float(table.sigma[0]) == pytest.approx(level, rel=1e-15)
        assert float(table.c_x[0]) == pytest.approx(1 - level**2 / 2, rel=1e-15)


@pytest.mark.parametrize(("sampler", "level"), SAMPLERS)
@pytest.mark.parametrize("last", [1e-9, -1e-9, -0.0, 1e-6, 5e-324])
def test_a_last_sigma_of_0_up_to_rounding_is_0(sampler, level, last):
    first = shifted(10)[:-1].tolist()
    table = af.StepTable([*first, last], sampler=sampler, noise_level=level)
    expected = af.StepTable([*first, 0.0], sampler=sampler, noise_level=level)
    assert same_rows(table, expected) and table.stochastic_steps == expected.stochastic_steps
    assert (9 in table.stochastic_steps) == (sampler != "cps")
    scattered = af.StepTable.from_steps([0.5, 0.2], [0.2, last], sampler=sampler, noise_level=level, sigma_1=0.9)
    assert scattered.s_end.tolist() == [0.2, 0.0] and scattered.stochastic_steps[-1] == (sampler != "cps")


def test_what_is_farther_than_rounding_from_the_ends_is_itself():
    table = af.StepTable([0.99967, 0.5, 1.2e-6], sampler="cps")
    assert table.s.tolist() == [0.99967, 0.5] and table.s_end.tolist() == [0.5, 1.2e-6]
    # Only the ends of a schedule stand for 1 and 0.
    inner = af.StepTable([1.0, 1 - 5e-7, 0.5, 5e-7, 0.0], sampler="ode")
    assert inner.dt.tolist() == torch.tensor([1.0, 1 - 5e-7, 0.5, 5e-7, 0.0], dtype=torch.float64).diff().tolist()
    for sigmas in ([1.000002, 0.5, 0.0], [1.0, 0.5, -2e-6], [1.0000001, 1.0, 0.0]):
        with pytest.raises(ValueError, match="accepted are numbers within"):
            af.StepTable(sigmas)


def diffusers_schedule(kind, shift, steps=10):
    diffusers = pytest.importorskip("diffusers", reason="the trainer's dependencies are not installed")
    if kind in ("FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete"):
        scheduler = getattr(diffusers, f"{kind}Scheduler")(shift=shift)
    else:
        options = {"use_flow_sigmas": True, "flow_shift": shift, "prediction_type": "flow_prediction"}
        scheduler = getattr(diffusers, f"{kind}Scheduler")(**options)
    scheduler.set_timesteps(steps)
    return scheduler.sigmas


@pytest.mark.parametrize(
    ("kind", "every"), [("FlowMatchEulerDiscrete", 1), ("FlowMatchHeunDiscrete", 18), ("UniPCMultistep", 18)]
)
def test_every_shift_of_a_real_scheduler_gives_the_formula(kind, every):
    a = 0.7
    schedules = [diffusers_schedule(kind, shift / 100) for shift in range(100, 1201, every)]
    if kind == "FlowMatchHeunDiscrete":  # holds every sigma but the ends twice
        schedules = [sigmas.unique().flip(0) for sigmas in schedules]
    exact = torch.stack(schedules).double()
    exact[:, 0] = 1
    s, h = exact[:, :-1], -exact.diff()
    std = a * (s / (1 - torch.where(s == 1, exact[:, 1:2], s))).sqrt()
    tables = [af.StepTable(sigmas, noise_level=a) for sigmas in schedules]
    for name, expected in (
        ("sigma", std * h.sqrt()),
        ("c_x", 1 - std**2 / (2 * s) * h),
        ("c_v", -h * (1 + std**2 * (1 - s) / (2 * s))),
    ):
        ours = torch.stack([getattr(table, name) for table in tables])
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-15)
    assert all(float(table.sigma[0]) == pytest.approx(a, rel=1e-14) for table in tables)


@pytest.mark.parametrize("shift", [1.0, 1.18, 3.0, 7.0, 12.0])
def test_a_schedule_that_starts_just_below_1_is_refused_where_its_noise_is_too_much(shift):
    """DPM++ starts at 0.9990 to 0.9999, and flow_grpo's 1 - s is what it says there."""
    sigmas = diffusers_schedule("DPMSolverMultistep", shift)
    first, following = sigmas[:2].tolist()
    c_x = 1 - 0.49 / (1 - first) * (first - following) / 2
    sentence = f"noise_level is 0.7, which gives step 0, from s = {first!r} to {following!r}, a sigma of "
    with pytest.raises(ValueError, match=re.escape(sentence)) as refusal:
        af.StepTable(sigmas)
    assert f"a c_x of {c_x:.6g}, below 0" in str(refusal.value) and c_x < -1
    clamped = 0.49 / 0.01 * (first - following) / 2 < 1
    assert ("convention 'clamp_0.99'" in str(refusal.value)) == clamped
    # Each way out that the sentence names is one.
    limit = float(re.search(r"noise_level of at most ([\d.e-]+)", str(refusal.value))[1])
    assert float(af.StepTable(sigmas, noise_level=0.999 * limit).c_x[0]) == pytest.approx(0.002, abs=1e-4)
    assert af.StepTable(sigmas, stochastic_steps=range(1, 9)).stochastic_steps == tuple(range(1, 9))
    if clamped:
        af.StepTable(sigmas, convention="clamp_0.99")
    for sampler in ("dance_sde", "cps", "flash_sde", "ode"):
        assert af.StepTable(sigmas, sampler=sampler).s[0] == first


# ---------------------------------------------------------------------------------------------------------------------
# Noise that a step cannot carry


@pytest.mark.parametrize("level", [50, 1.5, 1e8, 1e300])
@pytest.mark.parametrize("convention", ["next_sigma", "clamp_0.99"])
@pytest.mark.parametrize("sampler", ["flow_sde", "dance_sde", "flash_sde"])
def test_more_noise_than_x_can_carry_is_refused(sampler, convention, level):
    if level == 1.5 and sampler == "flash_sde":
        level = 9.0
    # At s = 1 "clamp_0.99" is a convention of a KL alone: what it refuses there is what every convention does.
    window = [0] if sampler == "flow_sde" else None
    with pytest.raises(ValueError, match=r"more noise than x can carry; accepted are a noise_level of at most") as said:
        af.StepTable(shifted(10), sampler=sampler, noise_level=level, convention=convention, stochastic_steps=window)
    assert str(said.value).startswith(f"noise_level is {float(level)!r}, which gives step ")
    limit = float(re.search(r"noise_level of at most ([\d.]+)", str(said.value))[1])
    table = af.StepTable(shifted(10), sampler=sampler, noise_level=0.999 * limit, stochastic_steps=window)
    assert float(table.c_x.min()) == pytest.approx(0.002, abs=1e-4)
    if sampler != "flash_sde":
        assert limit == pytest.approx(math.sqrt(2), rel=1e-5)
    assert af.StepTable(shifted(10), sampler="ode", noise_level=level).stochastic_steps == ()


def test_a_level_may_carry_all_of_x_away():
    assert float(af.StepTable(shifted(10), noise_level=math.sqrt(2), stochastic_steps=[0]).c_x[0]) == pytest.approx(0)
    last = af.StepTable(shifted(10), sampler="dance_sde", noise_level=math.sqrt(2))
    assert float(last.c_x[9]) == pytest.approx(0, abs=1e-15)


def test_what_trainers_run_is_carried():
    """flow_grpo, Flow-CPS and DanceGRPO with every shift and number of steps their recipes have, and more noise."""
    levels = {
        "flow_sde": [0.1, 0.7, 0.8, 1.0, 1.2],
        "dance_sde": [0.3, 0.7, 1.2],
        "cps": [0.7, 1.0],
        "flash_sde": [1.0],
    }
    for steps, shift, schedule in product([10, 16, 20, 25, 28, 40, 50], [1.0, 1.5, 3.0, 5.0, 7.0, 12.0], [0, 1]):
        sigmas = (shifted, twice_shifted)[schedule](steps, shift)
        for sampler, noise_levels in levels.items():
            for level in noise_levels:
                assert not (af.StepTable(sigmas, sampler=sampler, noise_level=level).c_x < 0).any()
    # UniRL's KL at s = 1 is made with numbers that no sampler could use.
    assert float(af.StepTable(shifted(10), noise_level=1.2, convention="clamp_0.99").c_x[0]) == pytest.approx(-1.571429)


# ---------------------------------------------------------------------------------------------------------------------
# Flash-SDE


def test_flash_grpos_weight_is_one_over_kappa():
    sigmas = twice_shifted(20)
    table = af.StepTable(sigmas, sampler="flash_sde", noise_level=1.0)
    s, h = sigmas[:-1], -sigmas.diff()
    std = sigmas[-1] + (sigmas[1] - sigmas[-1]) * s
    weight = 1 / (h.sqrt() / std + std * h.sqrt() * (1 - s) / (2 * s))
    torch.testing.assert_close(1 / table.kappa.abs(), weight, rtol=1e-13, atol=0)


def test_flash_sde_of_a_schedule_that_ends_above_0():
    sigmas = torch.tensor([1.0, 0.8, 0.4, 0.1], dtype=torch.float64)
    table = af.StepTable(sigmas, sampler="flash_sde", noise_level=0.5)
    std = torch.tensor([0.8, 0.1 + 0.7 * 0.8, 0.1 + 0.7 * 0.4], dtype=torch.float64) / 2
    torch.testing.assert_close(table.sigma, std * (-sigmas.diff()).sqrt())


def test_repr():
    table = af.StepTable(shifted(4), sampler="cps", noise_level=0.8, stochastic_steps=(1, 3))
    assert repr(table) == "StepTable(sampler='cps', noise_level=0.8, steps=4, stochastic_steps=[1])"
    levels = af.StepTable.from_steps([0.5, 0.4, 0.3], [0.2, 0.1, 0.2], noise_level=[0.7, 0.0, 0.25])
    assert repr(levels) == "StepTable(sampler='flow_sde', noise_level=0 to 0.7, steps=3, stochastic_steps=[0, 2])"
    assert repr(af.StepTable(shifted(40))).endswith("noise_level=0.7, steps=40, stochastic_steps=[0 to 39])")


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
        ({"sigmas": [1.0000051, 0.5, 0.0]}, r"sigmas is \[1.0000051, 0.5, 0.0\]"),
        ({"sigmas": [1.0, 0.5, 0.5]}, r"strictly decreasing \(sigmas\[2\] is not below sigmas\[1\]\)"),
        ({"sigmas": torch.linspace(1, 0, 1001).bfloat16()}, r", \.\.\. of 1001\]; .* \(sigmas\[1\] is not below"),
        ({"sigmas": [1.0, 0.9, 10**400]}, r"accepted are \[T \+ 1\] numbers"),
        ({"sigmas": [1.0, math.nan, 0.0]}, r"sigmas is \[1.0, nan, 0.0\]"),
        ({"sigmas": [0.5, 0.2, -0.1]}, r"sigmas is \[0.5, 0.2, -0.1\]"),
        ({"sampler": "ddpm"}, r"sampler is 'ddpm'; accepted are 'flow_sde', 'dance_sde', 'cps', 'ode', 'flash_sde'"),
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
