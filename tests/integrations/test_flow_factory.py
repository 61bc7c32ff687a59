"""What Flow-Factory alone does: its look-ups, its evaluation, what it asks to be returned, and AWM."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from advflow_ext.integrations import flow_factory
from tests.integrations.counting import Count, as_on_a_device
from tests.integrations.steps_of_trainers import SIGMAS, TRAINERS

FIELDS = ("next_latents", "next_latents_mean", "noise_pred", "log_prob", "std_dev_t", "dt")


@pytest.fixture(params=["stand-in", "real"])
def scheduler(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    TRAINERS["flow_factory"].load(monkeypatch, request.param)
    scheduler: Any = TRAINERS["flow_factory"].owner()(shift=1.0)
    scheduler.set_timesteps(sigmas=SIGMAS[:-1].tolist())
    yield scheduler
    flow_factory.uninstall()


def latents() -> tuple[torch.Tensor, torch.Tensor]:
    v, x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))[:, :, None].unbind(0)
    return v, x


def both(scheduler: Any, **given: Any) -> tuple[Any, Any]:
    """A step of theirs and the same of ours, drawn from one seed."""
    v, x = latents()
    results = []
    for installed in (False, True):
        if installed:
            flow_factory.install()
        results.append(scheduler.step(v, latents=x, generator=torch.Generator().manual_seed(1), **given))
    return results[0], results[1]


# What the adapters of its models pass, and the other ways it may be called.
CALLS = {
    "a timestep for all, on the schedule": lambda times: {"timestep": times[2]},
    "timesteps on the schedule": lambda times: {"timestep": times[[0, 2, 3, 9]]},
    "an index": lambda times: {"timestep": 3},
    "numbers": lambda times: {"timestep": 800.0, "timestep_next": 700.0, "noise_level": 0.4},
    "a last step": lambda times: {"timestep": times[9], "timestep_next": torch.tensor(0), "noise_level": 0.7},
    "a level for each": lambda times: {
        "timestep": times[:4], "timestep_next": times[1:5], "noise_level": torch.tensor([0.7, 0.5, 0.3, 0.1]),
    },
    "sigma_max": lambda times: {"timestep": times[0], "timestep_next": times[1], "noise_level": 0.7, "sigma_max": 0.9},
}  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
def test_every_way_to_name_a_step(scheduler, call):
    theirs, ours = both(scheduler, **CALLS[call](scheduler.timesteps), return_dict=False)
    for field, expected, found in zip(FIELDS, theirs, ours, strict=True):
        assert found.shape == expected.shape and (field == "log_prob" or found.dtype == expected.dtype), field
        infinite = ~torch.isfinite(expected)  # log sigma of a step without noise
        torch.testing.assert_close(found.float()[~infinite], expected[~infinite], rtol=2e-6, atol=2e-6, msg=field)
        assert (found[infinite] == 0).all()


@pytest.mark.parametrize("dynamics", ["Flow-SDE", "Dance-SDE", "CPS", "ODE"])
def test_evaluation_is_a_step_without_noise(scheduler, dynamics):
    scheduler.eval()
    times = scheduler.timesteps
    theirs, ours = both(scheduler, timestep=times[1], timestep_next=times[2], dynamics_type=dynamics)
    v, x = latents()
    torch.testing.assert_close(ours.next_latents, theirs.next_latents, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.next_latents, x + (SIGMAS[2] - SIGMAS[1]) * v, rtol=1e-5, atol=1e-5)
    assert torch.equal(ours.log_prob, torch.zeros(4, dtype=torch.float64))


def test_what_is_not_asked_for_is_not_computed(scheduler):
    times = scheduler.timesteps
    flow_factory.install()
    v, x = latents()
    given = {"timestep": times[1], "timestep_next": times[2], "noise_level": 0.7, "next_latents": x}
    counts = {}
    for names in (("log_prob",), ("log_prob", "next_latents_mean"), ("noise_pred",)):
        with Count(x.numel()) as count:
            found = scheduler.step(v, latents=x, return_kwargs=names, **given)
        assert {name for name in FIELDS if getattr(found, name) is not None} == set(names)
        counts[names] = count.large
    assert list(counts.values()) == [1, 3, 0]
    found = scheduler.step(v, latents=x, compute_log_prob=False, **given)
    assert found.log_prob is None and found.next_latents_mean is not None


def test_other_dynamics_are_refused(scheduler):
    flow_factory.install()
    v, x = latents()
    with pytest.raises(ValueError, match="dynamics_type is 'DDIM'; accepted are 'Flow-SDE', 'Dance-SDE', 'CPS' and"):
        scheduler.step(v, 800.0, x, timestep_next=700.0, noise_level=0.7, dynamics_type="DDIM")


def test_levels_of_another_batch_are_refused(scheduler):
    flow_factory.install()
    v, x = latents()
    with pytest.raises(ValueError, match=r"noise_level has shape \[3\]; accepted are one number and one for each of 4"):
        scheduler.step(v, 800.0, x, timestep_next=700.0, noise_level=torch.full((3,), 0.7))


@pytest.mark.parametrize("weighting", ["Uniform", "t", "t**2", "huber", "ghuber"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_awm(scheduler, weighting, dtype, monkeypatch):
    trainer = importlib.import_module("flow_factory.trainers.awm").AWMTrainer
    v, target = (each.to(dtype) for each in latents())
    timestep, A = torch.tensor([900.0, 500.0, 20.0, 1000.0]), torch.tensor([1.0, -1.0, 0.5, 2.0])
    found = []
    for installed in (False, True):
        if installed:
            flow_factory.install()
            as_on_a_device(monkeypatch)
        leaf = v.clone().requires_grad_()
        with Count(v.numel()) as count:
            log_prob = trainer.compute_weighted_log_prob(leaf, target, timestep, weighting, 0.3)
            (grad,) = torch.autograd.grad((log_prob * A).sum(), leaf)
        found.append((log_prob, grad, count))
    (theirs, slope, many), (ours, grad, few) = found
    assert ours.dtype == theirs.dtype == torch.float32 and grad.dtype == dtype
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    rounding = 2**-8 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(grad, slope, rtol=rounding, atol=1e-6 * float(slope.abs().max()))
    assert few.reads == 0 and few.large == 2 and many.large >= 8


def test_awm_at_time_0_and_under_another_name(scheduler):
    trainer = importlib.import_module("flow_factory.trainers.awm").AWMTrainer
    v, target = latents()
    timestep = torch.tensor([0.0])
    theirs = [trainer.compute_weighted_log_prob(v, target, timestep, weighting) for weighting in ("Uniform", "t")]
    flow_factory.install()
    for weighting, expected in zip(("Uniform", "t"), theirs, strict=True):
        found = trainer.compute_weighted_log_prob(v, target, timestep, weighting)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-30)
    with pytest.raises(ValueError, match=r"weighting is 'snr'; accepted are 'Uniform', 't', 't\*\*2', 'huber', 'ghu"):
        trainer.compute_weighted_log_prob(v, target, timestep, "snr")


def test_awm_is_put_back(scheduler):
    trainer = importlib.import_module("flow_factory.trainers.awm").AWMTrainer
    held = vars(trainer)["compute_weighted_log_prob"]
    flow_factory.install()
    assert vars(trainer)["compute_weighted_log_prob"] is not held
    flow_factory.uninstall()
    assert vars(trainer)["compute_weighted_log_prob"] is held


def test_a_python_without_the_trainer(monkeypatch):
    monkeypatch.setitem(sys.modules, "flow_factory.scheduler.flow_match_euler_discrete", None)
    with pytest.raises(ImportError, match=r"flow_factory.*cannot be imported .*; accepted is a Python that finds it"):
        flow_factory.install()
