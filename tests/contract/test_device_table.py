"""Tables made of a scheduler's tensors on another device, none of whose values is read."""

from __future__ import annotations

import math
import pickle

import pytest
import torch

import advflow_ext as af
from advflow_ext.contract import step_table
from advflow_ext.testing.transition_strategies import shifted
from tests.contract.published_steps import COLUMNS, SAMPLERS
from tests.ops.every_op import no_waiting
from tests.ops.transitions import SPACES

SIGMAS = shifted(10)
LEVELS = torch.tensor([0.7, 0.0, 0.25, 0.5, 0.0, 0.7, 0.7, 0.1, 0.3, 0.2], dtype=torch.float64)


@pytest.fixture
def unread(monkeypatch, device):
    """Makes tables as of another device; on a CPU, the same code on the CPU's tensors."""

    def make(s, s_end, **options):
        given = {"s": s, "s_end": s_end, **options}
        given = {key: value.to(device) if torch.is_tensor(value) else value for key, value in given.items()}
        with no_waiting(device), monkeypatch.context() as patched:
            if device == "cpu":
                patched.setattr(step_table, "device_of_unread", lambda *values: torch.device("cpu"))
            return af.StepTable.from_steps(**given)

    return make


@pytest.mark.parametrize("convention", ["next_sigma", "clamp_0.99"])
@pytest.mark.parametrize(("sampler", "level"), [*SAMPLERS, ("ode", 0.7), ("flow_sde", LEVELS), ("cps", LEVELS)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_its_steps_are_those_of_the_table_that_is_read(sampler, level, convention, dtype, unread):
    sigmas = SIGMAS.to(dtype)
    options = {"sampler": sampler, "convention": convention, "stochastic_steps": (0, 1, 2, 5), "sigma_1": SIGMAS[1]}
    table = unread(sigmas[:-1], sigmas[1:], noise_level=level, **options)
    read = af.StepTable.from_steps(sigmas[:-1], sigmas[1:], noise_level=level, **options)
    for name in COLUMNS:
        torch.testing.assert_close(getattr(table, name).cpu(), getattr(read, name), rtol=1e-14, atol=1e-15)
    rows = table.rows(torch.tensor([3, 0, -1, 10], device=table.s.device), torch.float64)
    expected = read.rows(torch.tensor([3, 0, -1, 10]), torch.float64)
    for row, other in zip(rows, expected, strict=True):
        torch.testing.assert_close(row.cpu(), other, rtol=1e-14, atol=1e-15, equal_nan=True)
    assert table.stochastic_steps == read.stochastic_steps and table.steps == 10
    assert repr(table).startswith(f"StepTable(sampler={sampler!r}, noise_level=")


def test_a_schedulers_scalars_are_one_step(unread):
    """Flow-Factory passes t and t_next, UniRL sigma and sigma_next."""
    table = unread(torch.tensor(0.5), torch.tensor(0.25), noise_level=torch.tensor(0.7))
    read = af.StepTable.from_steps([0.5], [0.25], noise_level=0.7)
    assert table.steps == 1
    for name in COLUMNS:
        torch.testing.assert_close(getattr(table, name).cpu(), getattr(read, name), rtol=1e-7, atol=0)


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
def test_a_level_a_sample_and_none_outside_its_window(space, unread, device):
    """verl-omni: [B, 1, 1, 1], 0 outside each sample's window; those are Euler steps, of log-probability 0."""
    level = torch.tensor([0.7, 0.0, 0.5, 0.0]).view(4, 1, 1, 1)
    table = unread(torch.tensor(0.75), torch.tensor(0.5), noise_level=level)
    assert table.steps == 4
    v, x, x_next = torch.randn(3, 4, 2, 8, 8, generator=torch.Generator().manual_seed(0)).to(device)
    v.requires_grad_()
    index = torch.arange(4, device=device)
    with no_waiting(device):
        values = space.transition_log_prob(v, x, x_next, table, index)
        (grad,) = torch.autograd.grad(values.sum(), v)
        step = space.sde_step(v.detach(), x, table, index, x_next)
    for row in range(4):
        one = af.StepTable.from_steps([0.75], [0.5], noise_level=float(level[row]))
        leaf = v[row : row + 1].detach().requires_grad_()
        alone = space.transition_log_prob(leaf, x[row : row + 1], x_next[row : row + 1], one, 0)
        torch.testing.assert_close(values[row : row + 1], alone, rtol=1e-6, atol=0)
        torch.testing.assert_close(grad[row : row + 1], torch.autograd.grad(alone, leaf)[0], rtol=1e-5, atol=1e-12)
    assert not values[[1, 3]].any() and not grad[[1, 3]].any() and values[[0, 2]].all()
    torch.testing.assert_close(step.x_next[1], x[1] - 0.25 * v[1].detach())


BROKEN = [
    {"s": 0.25, "s_end": 0.5},
    {"s": 1.5},
    {"s_end": -0.5},
    {"s": math.nan},
    {"noise_level": -0.5},
    {"noise_level": math.nan},
    {"noise_level": 50.0},
    {"noise_level": 1.5, "sampler": "cps"},
    {"s": 1.0},  # whose Flow-SDE needs sigma_1
    {"sampler": "flash_sde"},
]


@pytest.mark.parametrize("change", BROKEN, ids=str)
def test_a_step_that_would_be_refused_passes_for_no_number(change, unread, device):
    given = {"s": 0.5, "s_end": 0.25, "noise_level": 0.7, "sampler": "flow_sde", **change}
    with pytest.raises(ValueError, match="accepted"):
        af.StepTable.from_steps(**{k: [v] if isinstance(v, float) else v for k, v in given.items()})
    beside = {"s": 0.5, "s_end": 0.25, "noise_level": 0.5}
    columns = {key: torch.tensor([good, given[key]]) for key, good in beside.items()}
    table = unread(**columns, sampler=given["sampler"])
    bad, good = table.rows(torch.tensor([1, 0], device=device))[0].tolist()
    assert math.isnan(bad) and (math.isnan(good) if given["sampler"] == "flash_sde" else math.isfinite(good))
    assert 1 not in table.stochastic_steps
    v, x = torch.randn(2, 2, 8, device=device)
    out = af.sde_step(v, x, table, torch.arange(2, device=device))
    assert out.x_next[1].isnan().all() and out.log_prob[1].isnan()


def test_it_has_no_index_of_and_is_pickled(unread):
    table = unread(SIGMAS[:-1], SIGMAS[1:], sigma_1=SIGMAS[1], noise_level=0.5)
    with pytest.raises(ValueError, match="made on a device and not read; accepted is one made of numbers"):
        table.index_of(torch.tensor([500.0]))
    again = pickle.loads(pickle.dumps(table))
    assert torch.equal(again.c_v, table.c_v) and again.stochastic_steps == table.stochastic_steps


def test_flags_are_refused_unread(unread):
    for s, sentence in ((torch.tensor([True]), "s has dtype torch.bool"), (torch.zeros(2, 3), r"s has shape \[2, 3\]")):
        with pytest.raises(ValueError, match=sentence):
            unread(s, torch.tensor(0.1))
