"""What verl-omni alone does: a noise level a sample, its options, Flow-DPPO, log-probabilities on their way."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from advflow_ext.integrations import verl_omni
from tests.integrations.counting import Count, as_on_a_device
from tests.integrations.stand_ins.gaussians import log_density, transition
from tests.integrations.stand_ins.verl_omni import MODULES, SAMPLERS
from tests.integrations.steps_of_trainers import LEVELS, SIGMAS, TRAINERS

THRESHOLD = 1e-10  # of Flow-DPPO's KL, where its log-ratios are as small as float32 log-probabilities are wrong
FIELDS = ("prev_sample", "log_prob", "prev_sample_mean", "std_dev_t", "sqrt_dt")


@pytest.fixture(params=["stand-in", "real"])
def scheduler(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    TRAINERS["verl_omni"].load(monkeypatch, request.param)
    scheduler: Any = TRAINERS["verl_omni"].owner()(shift=1.0)
    scheduler.set_timesteps(sigmas=SIGMAS[:-1].tolist())
    yield scheduler
    verl_omni.uninstall()


def latents(samples: int = 4, size: tuple[int, ...] = (4, 8, 8)) -> tuple[Tensor, Tensor]:
    v, x = torch.randn(2, samples, *size, generator=torch.Generator().manual_seed(0))
    return v, x


def both(scheduler: Any, **given: Any) -> tuple[Any, Any]:
    v, x = latents()
    results = []
    for installed in (False, True):
        if installed:
            verl_omni.install()
        generator = torch.Generator().manual_seed(1)
        results.append(scheduler.sample_previous_step(x, v, generator=generator, return_sqrt_dt=True, **given))
    return results[0], results[1]


def assert_alike(theirs: Any, ours: Any) -> None:
    for field, expected, found in zip(FIELDS, theirs, ours, strict=True):
        if expected is None:
            assert found is None
            continue
        assert found.shape == expected.shape and (field == "log_prob" or found.dtype == expected.dtype), field
        finite = torch.isfinite(expected)  # theirs is NaN of a step without noise
        torch.testing.assert_close(found.float()[finite], expected[finite], rtol=2e-6, atol=2e-6, msg=field)
        assert (found[~finite] == 0).all()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_noise_level_for_each_sample(scheduler, sampler):
    """As its rollout passes them: 0 outside of a sample's own window."""
    scheduler._step_index = 3
    levels = torch.tensor([0.7, 0.0, 0.5, 0.0]).view(4, 1, 1, 1)
    theirs, ours = both(scheduler, noise_level=levels, sde_type=sampler)
    assert_alike(theirs, ours)
    v, x = latents()
    assert ours[1][1] == ours[1][3] == 0 and ours[3].shape == (4, 1, 1, 1)
    torch.testing.assert_close(ours[0][1], (x + (SIGMAS[4] - SIGMAS[3]) * v)[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(
    "given", [{}, {"noise_level": 0.0}, {"return_logprobs": False}, {"include_logprob_normalizer": False}], ids=str
)
def test_a_step_of_the_loop(scheduler, sampler, given):
    scheduler._step_index = 0
    theirs, ours = both(scheduler, **{"noise_level": 0.6, "sde_type": sampler, **given})
    assert_alike(theirs, ours)
    assert ours[3].shape == ()


def test_through_its_own_step(scheduler):
    if not hasattr(type(scheduler), "step") or "return_logprobs" not in type(scheduler).step.__code__.co_varnames:
        pytest.skip("the stand-in has diffusers' step")
    v, x = latents()
    results = []
    for installed in (False, True):
        if installed:
            verl_omni.install()
        scheduler._step_index = 2
        generator = torch.Generator().manual_seed(1)
        results.append(scheduler.step(v, scheduler.timesteps[2], x, generator=generator, return_dict=False))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found.float(), expected, rtol=2e-6, atol=2e-6)
    assert scheduler.step_index == 3


def test_a_timestep_of_another_schedule(scheduler, monkeypatch):
    verl_omni.install()
    v, x = latents()
    with pytest.raises(ValueError, match=r"timestep is \[1000\.0, 801\.0.*\]; accepted are those of the scheduler"):
        scheduler.sample_previous_step(x, v, timestep=torch.tensor([1000.0, 801.0, 1000.0, 1000.0]))
    as_on_a_device(monkeypatch)
    found = scheduler.sample_previous_step(x, v, timestep=torch.tensor([1000.0, 801.0, 1000.0, 1000.0]), prev_sample=x)
    assert found[1].isnan().tolist() == [False, True, False, False]


@pytest.mark.parametrize("wrong", ["sample", "model_output", "prev_sample"])
def test_half_precision_is_refused(scheduler, wrong):
    verl_omni.install()
    v, x = latents()
    given = {"sample": x, "model_output": v, "prev_sample": x}
    with pytest.raises(ValueError, match=rf"{wrong} is torch.bfloat16; accepted is float32\."):
        scheduler.sample_previous_step(**{**given, wrong: given[wrong].bfloat16()})


def test_other_samplers_and_tokens_are_refused(scheduler):
    verl_omni.install()
    v, x = latents()
    with pytest.raises(ValueError, match=r"sde_type is 'ddim'; accepted are 'sde', 'dance_sde', 'cps'\."):
        scheduler.sample_previous_step(x, v, timestep=scheduler.timesteps[:4], sde_type="ddim")
    with pytest.raises(NotImplementedError, match="per_token_timesteps is given; accepted"):
        scheduler.sample_previous_step(x, v, per_token_timesteps=x)


def dppo_masks(log_prob: Tensor, old: Tensor, mean: Tensor, mean_old: Tensor, sigma: Tensor, A: Tensor) -> Tensor:
    """What verl-omni's FlowDPPOLoss removes."""
    kl = ((mean - mean_old) ** 2 / (2 * sigma**2)).flatten(1).mean(1)
    return (kl >= THRESHOLD) & (((log_prob - old).exp() > 1) & (A > 0) | ((log_prob - old).exp() < 1) & (A < 0))


def test_the_mask_of_flow_dppo_is_that_of_float64(scheduler):
    """Its loss stays; with log-probabilities in float64 it takes the right side of a ratio of 1."""
    v_old, x = latents(192, (16, 16, 16))
    index = torch.arange(192) % 8
    times, A = scheduler.timesteps[index], torch.randn(192, generator=torch.Generator().manual_seed(4))
    v = v_old + 1e-4 * torch.randn(v_old.shape, generator=torch.Generator().manual_seed(2))
    shape = (-1, 1, 1, 1)
    s, s_end = (SIGMAS.double()[places].view(shape) for places in (index, index + 1))
    x_next = scheduler.sample_previous_step(x, v_old, times, torch.Generator().manual_seed(6))[0]
    exact = [
        transition("flow_sde", velocity.double(), x.double(), s, s_end, torch.tensor(0.7), SIGMAS.double()[1])
        for velocity in (v, v_old)
    ]
    densities = [log_density(x_next.double(), mean, sigma) for mean, _, sigma in exact]
    wanted = dppo_masks(*densities, exact[0][0], exact[1][0], exact[0][2], A)
    assert 0.1 < wanted.double().mean() < 0.9
    wrong = []
    for installed in (False, True):
        if installed:
            verl_omni.install()
        (_, new, mean, std, root), (_, old, mean_old, _, _) = (
            scheduler.sample_previous_step(x, each, timestep=times, prev_sample=x_next, return_sqrt_dt=True)
            for each in (v, v_old)
        )
        found = dppo_masks(new, old, mean, mean_old, std * root.view(shape), A)
        wrong.append(int((found != wanted).sum()))
    assert wrong[1] == 0 < wrong[0]


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An engine, and the two trainers that cast; the real ones need ray and a rollout engine."""
    TRAINERS["verl_omni"].load(monkeypatch, "stand-in")
    yield {name.rpartition(".")[2]: importlib.import_module(name) for name in MODULES}
    verl_omni.uninstall()


class Workers:
    def __init__(self, log_probs: Tensor) -> None:
        self.log_probs, self.world_size = log_probs, 8

    def infer_actor_batch(self, batch: Any) -> dict[str, Tensor]:
        return {"log_probs": self.log_probs}


@pytest.mark.parametrize("version", ["ray", "v1"])
def test_a_trainer_keeps_float64(parts, version):
    log_probs = torch.tensor([[-0.9, -1.1]], dtype=torch.float64) / 3
    trainers = {
        "ray": lambda: parts["ray_diffusion_trainer"].PolicyGradientRayTrainer,
        "v1": lambda: parts["trainer_base"].PolicyGradientDiffusionTrainerV1,
    }
    workers = Workers(log_probs)
    trainer = trainers[version]()(workers)

    def old() -> Tensor:
        found = trainer._compute_old_log_prob("a batch")
        if version == "ray":
            found, mfu = found
            assert mfu == 0.4
        kept: Tensor = found.batch["old_log_probs"]
        return kept

    assert old().dtype == torch.float32
    verl_omni.install()
    assert torch.equal(old(), log_probs) and trainer.actor_rollout_wg is workers
    verl_omni.uninstall()
    assert old().dtype == torch.float32


def test_a_trainer_has_its_workers_back_after_an_error(parts):
    verl_omni.install()
    workers = SimpleNamespace()
    trainer = parts["ray_diffusion_trainer"].PolicyGradientRayTrainer(workers)
    with pytest.raises(AttributeError, match="infer_actor_batch"):
        trainer._compute_old_log_prob("a batch")
    assert trainer.actor_rollout_wg is workers


def test_an_engine_casts_the_new_like_the_old(parts):
    engine = parts["diffusers_impl"].PPODiffusersFSDPEngine()
    output = torch.randn(3, dtype=torch.float64), *torch.randn(3, 3)
    verl_omni.install()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert engine.prepare_model_outputs(output, {})["log_probs"] is output[0]
        kept = engine.prepare_model_outputs(output, {"old_log_probs": output[0][:, None]})
        assert kept["log_probs"].dtype == torch.float64
    with pytest.warns(RuntimeWarning, match=r"verl-omni's trainer has cast old_log_probs to torch\.float32"):
        cast = engine.prepare_model_outputs(output, {"old_log_probs": output[0][:, None].float()})
    assert torch.equal(cast["log_probs"], output[0].float()) and torch.equal(cast["sqrt_dt"], output[3])


def test_a_driver_without_engines(parts, monkeypatch):
    """What a process cannot import it does not use."""
    monkeypatch.setitem(sys.modules, "verl_omni.workers.engine.fsdp.diffusers_impl", None)
    verl_omni.install()
    assert [kept.name for kept in verl_omni._patch._kept] == ["sample_previous_step", *["_compute_old_log_prob"] * 2]


def test_the_lookup_is_made_on_the_device(scheduler, monkeypatch):
    verl_omni.install()
    as_on_a_device(monkeypatch)
    v, x = latents()
    with Count(x.numel()) as count:
        scheduler.sample_previous_step(x, v, timestep=scheduler.timesteps[:4], prev_sample=x, noise_level=LEVELS["cps"])
    assert count.reads == 0
