"""Trainers' step functions that are replaced by name: our stand-ins and, where PEERS says so, their own code."""

from __future__ import annotations

import ast
import inspect
import os
import sys
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from advflow_ext.conformance import rollout
from advflow_ext.integrations import dance_grpo, flow_grpo, mix_grpo

STAND_INS = Path(__file__).parent / "stand_ins"
SIGMAS = rollout.shifted_twice(10).float()
STEPS = torch.tensor([0, 3, 5, 8])
PLACE = 3  # of functions that take one step for all


class Returned(NamedTuple):
    x_next: Tensor
    log_prob: Tensor
    mean: Tensor | None
    everything: tuple[Tensor, ...]


class Named(NamedTuple):
    """A function under its trainer's name, called in one way for all."""

    integration: ModuleType
    module: str
    name: str
    sampler: str  # "flow_sde", "cps" or "dance_sde"
    level: float
    step: Callable[..., Returned]  # (function, index, v, x, x_next, level)
    stand_in: str  # the function's file and name there
    checkout: str  # the file in the folder PEERS
    dtype: torch.dtype = torch.float32  # of velocities
    constants: bool = True  # of the log-probability

    def function(self) -> Callable[..., Any]:
        found: Callable[..., Any] = vars(sys.modules[self.module])[self.name]
        return found

    def __call__(
        self, index: Tensor, v: Tensor, x: Tensor, x_next: Tensor | None = None, level: float | None = None
    ) -> Returned:
        """One seed; ``index`` is ``[N]``, one and the same for those that take one."""
        torch.manual_seed(5)
        return self.step(self.function(), index, v, x, x_next, self.level if level is None else level)

    @property
    def steps(self) -> Tensor:
        return STEPS if self.integration is flow_grpo else torch.full((4,), PLACE)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a latent at 512 px."""
        return (16, 64, 64) if self.integration is flow_grpo else (1024, 64)

    def latents(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(3)
        shape = (4, *(size // 4 for size in self.shape))
        v, x = (torch.randn(shape, generator=generator) for _ in range(2))
        return v.to(self.dtype), x

    def truth(self, v: Tensor, x: Tensor, x_next: Tensor, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean and log-probability by the trainer's formula in float64."""
        at = self.steps if index is None else index
        column = (-1, *[1] * (x.dim() - 1))
        s, following = (SIGMAS.double()[places].view(column) for places in (at, at + 1))
        given = v.double(), x.double(), s, following, self.level
        if self.sampler == "flow_sde":
            gaussian = rollout.flow_sde(*given, SIGMAS.double()[1])
        else:
            gaussian = rollout.cps(*given) if self.sampler == "cps" else rollout.dance_sde(*given)
        density = rollout.log_prob_without_variance if self.sampler == "cps" else rollout.log_prob
        log_prob = density(x_next.double(), gaussian)
        if not self.constants:
            log_prob = log_prob + gaussian[1].flatten().log() + torch.log(torch.tensor(2 * torch.pi).double()) / 2
        return gaussian[0], log_prob


def scheduler() -> SimpleNamespace:
    """What of diffusers' flow-matching scheduler these functions read."""
    timesteps = 1000 * SIGMAS[:-1]

    def index_for_timestep(timestep: Tensor) -> int:
        return int((timesteps == timestep).nonzero()[0].item())

    return SimpleNamespace(sigmas=SIGMAS, timesteps=timesteps, index_for_timestep=index_for_timestep)


def _flow_grpo_step(
    function: Callable[..., Any],
    index: Tensor,
    v: Tensor,
    x: Tensor,
    x_next: Tensor | None,
    level: float,
    **options: Any,
) -> Returned:
    if "return_sqrt_dt" in inspect.signature(function).parameters:
        options["return_sqrt_dt"] = True
    at = scheduler()
    found = function(at, v, at.timesteps[index], x, noise_level=level, prev_sample=x_next, **options)
    return Returned(found[0], found[1], found[2], found)


def _flow_grpo_cps(*given: Any) -> Returned:
    options = {"sde_type": "cps"} if "sde_type" in inspect.signature(given[0]).parameters else {}
    return _flow_grpo_step(*given, **options)


def _flux_step(
    function: Callable[..., Any], index: Tensor, v: Tensor, x: Tensor, x_next: Tensor | None, level: float
) -> Returned:
    # As scripts do: a number in a rollout, a 0-dimensional tensor in training.
    at = PLACE if x_next is None else index[0]
    found = function(v, x, level, SIGMAS, at, prev_sample=x_next, grpo=True, sde_solver=level > 0)
    return Returned(found[0], found[2], None, found)


def _mix_flow_step(
    function: Callable[..., Any], index: Tensor, v: Tensor, x: Tensor, x_next: Tensor | None, level: float
) -> Returned:
    at = PLACE if x_next is None else index[0]
    found = function(v, x, level, SIGMAS, at, prev_sample=x_next, determistic=False)
    return Returned(found[0], found[2], found[3], found)


_SD3 = (flow_grpo, flow_grpo.MODULE, flow_grpo.NAME)
_FLUX = (dance_grpo, "fastvideo.train_grpo_flux", dance_grpo.NAME)
_MIX = (mix_grpo, mix_grpo.MODULE)
_SD3_FILE = "flow_grpo/diffusers_patch/sd3_sde_with_logprob.py"
_MIX_FILE = "MixGRPO/fastvideo/utils/sampling_utils.py"
_HALF = torch.bfloat16

NAMED = {
    "flow_grpo": Named(
        *_SD3, "flow_sde", 0.7, _flow_grpo_step, "flow_grpo.py:as_of_9745241", f"flow_grpo/{_SD3_FILE}"
    ),
    "flow_grpo CPS": Named(
        *_SD3, "cps", 0.8, _flow_grpo_cps, "flow_grpo.py:as_of_9745241", f"flow_grpo/{_SD3_FILE}"
    ),
    "flow_grpo at ac4c86e": Named(*_SD3, "flow_sde", 0.7, _flow_grpo_step, "flow_grpo.py:as_of_ac4c86e", ""),
    "flow_grpo at 3d02fd9, CPS": Named(*_SD3, "cps", 0.8, _flow_grpo_cps, "flow_grpo.py:as_of_3d02fd9", ""),
    "FlowCPS": Named(*_SD3, "cps", 0.8, _flow_grpo_cps, "flow_grpo.py:as_of_flow_cps", f"FlowCPS/{_SD3_FILE}"),
    "DanceGRPO": Named(
        *_FLUX, "dance_sde", 0.3, _flux_step, "fastvideo.py:flux_step", "DanceGRPO/fastvideo/train_grpo_flux.py"
    ),
    "DanceGRPO, bf16": Named(
        *_FLUX, "dance_sde", 0.3, _flux_step, "fastvideo.py:flux_step", "DanceGRPO/fastvideo/train_grpo_flux.py", _HALF
    ),
    "MixGRPO": Named(
        *_MIX, "flow_grpo_step", "flow_sde", 0.7, _mix_flow_step, "fastvideo.py:flow_grpo_step", _MIX_FILE
    ),
    "MixGRPO, bf16": Named(
        *_MIX, "flow_grpo_step", "flow_sde", 0.7, _mix_flow_step, "fastvideo.py:flow_grpo_step", _MIX_FILE, _HALF
    ),
    "MixGRPO, Dance": Named(
        *_MIX, "dance_grpo_step", "dance_sde", 0.3, _flux_step, "fastvideo.py:dance_grpo_step", _MIX_FILE,
        constants=False,
    ),
}  # fmt: skip


def load_stand_in(monkeypatch: pytest.MonkeyPatch, named: Named) -> ModuleType:
    file, _, function = named.stand_in.partition(":")
    module = _load(monkeypatch, named.module, STAND_INS / file)
    setattr(module, named.name, getattr(module, function))
    return module


def load_checkout(monkeypatch: pytest.MonkeyPatch, named: Named) -> ModuleType:
    """Only the file of the function; of a script, whose imports are those of a training run, only the function."""
    peers = Path(os.environ["PEERS"])
    if not named.checkout:
        pytest.skip("PEERS has one version of a trainer")
    file = peers / named.checkout
    if not file.is_file():
        pytest.skip(f"there is no {named.checkout} in {peers}")
    if named.integration is dance_grpo:
        return load_function(monkeypatch, named.module, named.name, file)
    module = _load(monkeypatch, named.module, file)
    names = inspect.signature(vars(module)[named.name]).parameters
    if named.checkout.startswith("flow_grpo/") and named.sampler == "cps" and "sde_type" not in names:
        pytest.skip("this version of flow_grpo has no CPS")
    return module


def load_function(monkeypatch: pytest.MonkeyPatch, module: str, name: str, file: Path) -> ModuleType:
    """A module with one function of a file, and what that needs of the standard library and torch."""
    import math

    (definition,) = (node for node in ast.parse(file.read_text()).body if getattr(node, "name", "") == name)
    made = ModuleType(module)
    vars(made).update(math=math, torch=torch)
    exec(compile(ast.Module([definition], []), str(file), "exec"), vars(made))
    monkeypatch.setitem(sys.modules, module, made)
    return made


def _load(monkeypatch: pytest.MonkeyPatch, name: str, file: Path) -> ModuleType:
    spec = spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module
