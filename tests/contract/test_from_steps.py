"""Tables of steps that need not follow one another, with a noise level for each."""

from __future__ import annotations

import math

import pytest
import torch

import advflow_ext as af
from advflow_ext.testing.transition_strategies import shifted
from tests.contract.published_steps import COLUMNS, SAMPLERS, SCHEDULES, published_step, same_rows

# ---------------------------------------------------------------------------------------------------------------------
# Steps that need not follow one another


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("convention", ["next_sigma", "clamp_0.99"])
@pytest.mark.parametrize(("sampler", "level"), [*SAMPLERS, ("ode", 0.7), ("flow_sde", 0.0)])
def test_a_schedule_is_a_table_of_its_steps(schedule, convention, sampler, level):
    sigmas = schedule(10)
    options = {"sampler": sampler, "noise_level": level, "convention": convention, "stochastic_steps": (0, 3, 4, 8)}
    ends = {"sigma_1": sigmas[1], "sigma_min": float(sigmas[-1])}
    whole = af.StepTable(sigmas, **options)
    assert same_rows(af.StepTable.from_steps(sigmas[:-1], sigmas[1:], **ends, **options), whole)
    # In any order, any number of times.
    order = torch.tensor([7, 0, 0, 9, 3, 1, 4, 8, 3])
    options["stochastic_steps"] = [k for k, step in enumerate(order.tolist()) if step in (0, 3, 4, 8)]
    some = af.StepTable.from_steps(sigmas[:-1][order], sigmas[1:][order], **ends, **options)
    for name in COLUMNS:
        assert torch.equal(getattr(some, name), getattr(whole, name)[order])
    assert some.steps == 9 and torch.equal(some.rows(torch.arange(9)).kappa, whole.rows(order).kappa)


@pytest.mark.parametrize("sampler", ["flow_sde", "dance_sde", "cps", "flash_sde"])
@pytest.mark.parametrize("kind", [list, torch.tensor, lambda levels: torch.tensor(levels, dtype=torch.float64)])
def test_every_sample_may_have_its_own_noise_level(sampler, kind):
    """verl-omni: a level a sample, 0 outside its window."""
    sigmas, index, levels = shifted(10), [0, 3, 3, 7, 5], [0.75, 0.125, 0.0, 1.0, 0.5]
    table = af.StepTable.from_steps(
        sigmas[index], sigmas[1:][index], sampler=sampler, noise_level=kind(levels), sigma_1=float(sigmas[1])
    )
    assert table.stochastic_steps == (0, 1, 3, 4) and table.noise_level.tolist() == levels
    for row, (step, level) in enumerate(zip(index, levels, strict=True)):
        one = af.StepTable(sigmas, sampler=sampler, noise_level=level)
        for name in COLUMNS:
            assert getattr(table, name)[row] == getattr(one, name)[step]


def test_levels_of_a_schedule_may_be_a_schedule():
    levels = [1.0, 0.5, 0.0, 0.25]
    table = af.StepTable(shifted(4), noise_level=levels)
    for step, level in enumerate(levels):
        assert table.sigma[step] == af.StepTable(shifted(4), noise_level=level).sigma[step]
    for level in (torch.tensor(0.5), torch.full((4,), 0.5), [0.5] * 4):
        same = af.StepTable(shifted(4), noise_level=level)
        assert same_rows(same, af.StepTable(shifted(4), noise_level=0.5)) and same.noise_level == 0.5


def test_steps_that_skip_and_overlap_are_the_published_step():
    """A coarse step, and the finer ones within it (Pave-GRPO)."""
    s, s_end = [1.0, 1.0, 0.96, 0.9], [0.9, 0.96, 0.9, 0.7]
    x, v = torch.randn(2, 100, generator=torch.Generator().manual_seed(0), dtype=torch.float64).unbind()
    for sampler, level in SAMPLERS:
        table = af.StepTable.from_steps(s, s_end, sampler=sampler, noise_level=level, sigma_1=0.9)
        for k in range(4):
            # The published step reads the second sigma of its schedule, its own, the following and the last one.
            sigmas = torch.tensor([s[k], 0.9, s[k], s_end[k], 0.0], dtype=torch.float64)
            mean, sigma = published_step(sampler, level, sigmas, 2, x, v)
            torch.testing.assert_close(table.c_x[k] * x + table.c_v[k] * v, mean, rtol=1e-13, atol=1e-13)
            assert float(table.sigma[k]) == pytest.approx(sigma, rel=1e-13)


def test_sigma_1_is_asked_for_where_it_is_needed():
    needed = r"sigma_1 is None; accepted for sampler '{}' and step {}, which starts at s = {}, is the second sigma"
    steps = ([0.5, 1.0], [0.2, 0.9])
    with pytest.raises(ValueError, match=needed.format("flow_sde", 1, 1)):
        af.StepTable.from_steps(*steps)
    with pytest.raises(ValueError, match=needed.format("flash_sde", 0, 0.5)):
        af.StepTable.from_steps(*steps, sampler="flash_sde")
    for options in (
        {"sampler": "cps"},
        {"sampler": "dance_sde"},
        {"sampler": "ode"},
        {"convention": "clamp_0.99"},
        {"stochastic_steps": [0]},
        {"noise_level": [0.7, 0.0]},
    ):
        assert af.StepTable.from_steps(*steps, **options).steps == 2


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"s": torch.rand(2, 2)}, r"s has shape \[2, 2\]; accepted are a number and \[T\] numbers, T of at least 1"),
        ({"s": []}, r"s has shape \[0\]"),
        ({"s": None}, r"s is None; accepted is a finite number of at least 0, or \[T\] of them"),
        ({"s_end": [0.5]}, r"s_end has shape \[1\]; accepted are a number and \[2\] numbers"),
        ({"s_end": [0.9, 0.5]}, r"s\[1\] is 0.5 and s_end\[1\] is 0.5; accepted are 0 <= s_end < s <= 1"),
        ({"s": [1.1, 0.5]}, r"s\[0\] is 1.1 and s_end\[0\] is 0.9; accepted are"),
        ({"s_end": [0.9, -0.1]}, r"s_end\[1\] is -0.1"),
        ({"s": [1.0, math.nan]}, r"s\[1\] is nan"),
        ({"noise_level": [0.7]}, r"noise_level has shape \[1\]; accepted are a number and \[2\] numbers"),
        ({"noise_level": [0.7, -0.1]}, r"noise_level\[1\] is -0.1; accepted are finite numbers of at least 0"),
        ({"noise_level": [math.inf, 0.1]}, r"noise_level\[0\] is inf; accepted are finite numbers"),
        ({"noise_level": [0.7, 50.0]}, r"noise_level is 50.0, which gives step 1, from s = 0.5 to 0.2, a sigma of"),
        ({"noise_level": [0.5, 1.1], "sampler": "cps"}, r"noise_level is 1.1; accepted for sampler 'cps'"),
        ({"noise_level": "high"}, r"noise_level is 'high'; accepted are a number and \[T\] numbers"),
        ({"sigma_1": [0.9]}, r"sigma_1 has shape \[1\]; accepted are a number and \[2\] numbers"),
        ({"sigma_1": 1.0}, r"sigma_1\[0\] is 1.0; accepted are numbers of at least 0 and below 1"),
        ({"sigma_min": -0.1}, r"sigma_min is -0.1; accepted is a finite number of at least 0"),
        ({"stochastic_steps": [2]}, r"stochastic_steps has 2; accepted are the steps 0 to 1, or None"),
        ({"convention": "0.99"}, r"convention is '0.99'; accepted are"),
        ({"sampler": "ddpm"}, r"sampler is 'ddpm'; accepted are"),
    ],
)
def test_misuse_of_steps_is_said_in_a_sentence(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        af.StepTable.from_steps(**{"s": [1.0, 0.5], "s_end": [0.9, 0.2], "sigma_1": 0.9, **change})
