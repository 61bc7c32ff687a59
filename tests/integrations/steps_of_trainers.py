"""Each trainer's step under one name: how it is called, and what it returns."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from advflow_ext.integrations import flow_factory, unirl, verl_omni
from tests.integrations import loading
from tests.integrations.stand_ins import flow_factory as ff_stand_in
from tests.integrations.stand_ins import unirl as unirl_stand_in
from tests.integrations.stand_ins import verl_omni as verl_stand_in

SIGMAS = torch.tensor([1.0, 0.96429, 0.92308, 0.875, 0.81818, 0.75, 0.66667, 0.5625, 0.42857, 0.25, 0.0])
LEVELS = {"flow_sde": 0.7, "dance_sde": 0.3, "cps": 0.8}


FLOAT32, MIXED = (torch.float32,), (torch.float32, torch.bfloat16)


class Drawn(NamedTuple):
    x_next: Tensor
    log_prob: Tensor
    mean: Tensor


class Trainer(NamedTuple):
    integration: ModuleType
    load: Callable[[pytest.MonkeyPatch, str], None]
    owner: Callable[[], type]
    name: str
    step: Callable[..., Drawn]  # (sampler, index [N], v, x, x_next=None)
    dtypes: tuple[torch.dtype, ...]  # of latents


@cache
def _scheduler(owner: type) -> Any:
    scheduler = owner(shift=1.0)  # type: ignore[call-arg]
    scheduler.set_timesteps(sigmas=SIGMAS[:-1].tolist())
    return scheduler


def _flow_factory(sampler: str, index: Tensor, v: Tensor, x: Tensor, x_next: Tensor | None = None) -> Drawn:
    scheduler = _scheduler(_flow_factory_owner())
    names = {sampler: name for name, sampler in ff_stand_in.SAMPLERS.items()}
    times = torch.cat([scheduler.timesteps, torch.zeros(1)])
    found = scheduler.step(
        v, times[index], x, x_next, timestep_next=times[index + 1], noise_level=LEVELS[sampler],
        dynamics_type=names[sampler], generator=torch.Generator().manual_seed(5),
    )  # fmt: skip
    return Drawn(found.next_latents, found.log_prob, found.next_latents_mean)


def _flow_factory_owner() -> type:
    module = importlib.import_module("flow_factory.scheduler.flow_match_euler_discrete")
    owner: type = module.FlowMatchEulerDiscreteSDEScheduler
    return owner


def _unirl(sampler: str, index: Tensor, v: Tensor, x: Tensor, x_next: Tensor | None = None) -> Drawn:
    name = {"flow_sde": "FlowSDEStrategy", "dance_sde": "DanceSDEStrategy", "cps": "CPSSDEStrategy"}[sampler]
    strategy = getattr(importlib.import_module("unirl.sde.kernels"), name)()
    torch.manual_seed(5)
    found = strategy.denoise(
        v, x, SIGMAS[index], SIGMAS[index + 1], eta=LEVELS[sampler], prev_sample=x_next, sigma_max=SIGMAS[1]
    )
    return Drawn(*found)


def _verl_omni(sampler: str, index: Tensor, v: Tensor, x: Tensor, x_next: Tensor | None = None) -> Drawn:
    names = {sampler: name for name, sampler in verl_stand_in.SAMPLERS.items()}
    scheduler = _scheduler(_verl_omni_owner())
    found = scheduler.sample_previous_step(
        x, v, timestep=scheduler.timesteps[index], noise_level=LEVELS[sampler], prev_sample=x_next,
        sde_type=names[sampler], generator=torch.Generator().manual_seed(5),
    )  # fmt: skip
    return Drawn(*found[:3])


def _verl_omni_owner() -> type:
    module = importlib.import_module("verl_omni.pipelines.schedulers.flow_match_sde")
    owner: type = module.FlowMatchSDEDiscreteScheduler
    return owner


def _load_flow_factory(monkeypatch: pytest.MonkeyPatch, which: str) -> None:
    if which == "stand-in":
        loading.stand_in(monkeypatch, ff_stand_in.MODULES)
    else:
        loading.real(monkeypatch, "src/flow_factory/scheduler/flow_match_euler_discrete.py")


def _load_unirl(monkeypatch: pytest.MonkeyPatch, which: str) -> None:
    if which == "stand-in":
        loading.stand_in(monkeypatch, unirl_stand_in.MODULES)
    else:
        loading.real(monkeypatch, "unirl/sde/kernels.py")


def _load_verl_omni(monkeypatch: pytest.MonkeyPatch, which: str) -> None:
    if which == "stand-in":
        loading.stand_in(monkeypatch, verl_stand_in.MODULES)
    else:
        loading.real(
            monkeypatch, "verl_omni/pipelines/schedulers/flow_match_sde.py",
            without_init=("verl_omni", "verl_omni.pipelines"),
        )  # fmt: skip


def _unirl_owner() -> type:
    owner: type = importlib.import_module("unirl.sde.kernels").StepStrategy
    return owner


TRAINERS = {
    "flow_factory": Trainer(flow_factory, _load_flow_factory, _flow_factory_owner, "step", _flow_factory, MIXED),
    "unirl": Trainer(unirl, _load_unirl, _unirl_owner, "denoise", _unirl, MIXED),
    "verl_omni": Trainer(verl_omni, _load_verl_omni, _verl_omni_owner, "sample_previous_step", _verl_omni, FLOAT32),
}
