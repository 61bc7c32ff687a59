"""What is flow_grpo's alone: calls of its pipelines, its generators, and versions that share a signature."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch

from advflow_ext.integrations import flow_grpo
from tests.integrations import named_steps
from tests.integrations.counting import as_on_a_device
from tests.integrations.named_steps import NAMED, scheduler

Step = Callable[..., tuple[torch.Tensor, ...]]


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    yield named_steps.load_stand_in(monkeypatch, NAMED["flow_grpo"])
    flow_grpo.uninstall()


@pytest.fixture
def step(module: ModuleType) -> Step:
    flow_grpo.install()
    return lambda *given, **named: module.sde_step_with_logprob(*given, **named)  # pytest keeps what a fixture returns


def test_it_says_what_it_replaced(module, capsys):
    flow_grpo.install()
    flow_grpo.install()
    assert capsys.readouterr().out == (
        "advflow_ext in flow_grpo: sde_step_with_logprob of yifan123/flow_grpo as of 9745241 (zhtmike/flow_grpo) "
        "replaced; log-probabilities are float64, nothing is stored.\n"
    )


@pytest.mark.parametrize(("name", "words"), [("flow_grpo at ac4c86e", "flow_grpo at ac4c86e"), ("FlowCPS", "FlowCPS")])
def test_two_forks_of_one_signature_are_told_apart_by_their_numbers(name, words, monkeypatch, capsys):
    named_steps.load_stand_in(monkeypatch, NAMED[name])
    flow_grpo.install()
    assert words in capsys.readouterr().out
    flow_grpo.uninstall()


def test_a_pipeline_asks_once_for_all_samples(module):
    v, x = NAMED["flow_grpo"].latents()
    at = scheduler()
    theirs = module.sde_step_with_logprob(at, v, at.timesteps[3:4], x, prev_sample=x)
    flow_grpo.install()
    ours = module.sde_step_with_logprob(at, v, at.timesteps[3:4], x, prev_sample=x)
    assert ours[3].shape == theirs[3].shape == (1, 1, 1, 1) and ours[1].shape == (4,)
    each = module.sde_step_with_logprob(at, v, at.timesteps[3].expand(4), x, prev_sample=x)
    assert torch.equal(each[1], ours[1]) and torch.equal(each[2], ours[2])


def test_their_own_generator_draws(module, step):
    v, x = NAMED["flow_grpo"].latents()
    at = scheduler()
    drawn = [step(at, v, at.timesteps[3:4], x, generator=torch.Generator().manual_seed(2))[0] for _ in range(2)]
    noise = module.randn_tensor(v.shape, torch.Generator().manual_seed(2))
    mean, std_dev_t, sqrt_dt = step(at, v, at.timesteps[3:4], x, prev_sample=x, return_sqrt_dt=True)[2:]
    assert torch.equal(*drawn)
    torch.testing.assert_close(drawn[0], mean + std_dev_t * sqrt_dt * noise, rtol=1e-6, atol=1e-6)


def test_half_precision_is_widened_as_theirs(step):
    v, x = (each.bfloat16() for each in NAMED["flow_grpo"].latents())
    at = scheduler()
    found = step(at, v, at.timesteps[:4], x, prev_sample=x)
    widened = step(at, v.float(), at.timesteps[:4], x.float(), prev_sample=x.float())
    assert all(torch.equal(one, other) for one, other in zip(found, widened, strict=True))


def test_a_timestep_that_is_none(step, monkeypatch):
    v, x = NAMED["flow_grpo"].latents()
    at = scheduler()
    with pytest.raises(ValueError, match=r"^timestep is \[1000.0, 500.25\]; accepted are the scheduler's, \[1000.0, "):
        step(at, v[:2], torch.tensor([1000.0, 500.25]), x[:2], prev_sample=x[:2])
    with pytest.raises(ValueError, match=r"^timestep has shape \[3\]; accepted are one number and one for each of 4"):
        step(at, v, at.timesteps[:3], x, prev_sample=x)
    as_on_a_device(monkeypatch)  # where nobody looks, it is not a number
    found = step(at, v[:2], torch.tensor([1000.0, 500.25]), x[:2], prev_sample=x[:2])
    assert found[1].isnan().tolist() == [False, True] and found[2].isnan().flatten(1).all(1).tolist() == [False, True]


def test_a_sampler_that_is_none(step):
    v, x = NAMED["flow_grpo"].latents()
    at = scheduler()
    with pytest.raises(ValueError, match=r"^sde_type is 'dance'; accepted are 'sde' and 'cps'\.$"):
        step(at, v, at.timesteps[:1], x, sde_type="dance")


def test_without_flow_grpo(monkeypatch):
    monkeypatch.setitem(sys.modules, flow_grpo.MODULE, None)
    with pytest.raises(
        ImportError, match=r"^flow_grpo is not to be patched: flow_grpo\.diffusers_patch\.sd3_sde_with_"
    ):
        flow_grpo.install()
