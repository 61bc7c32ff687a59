"""yifan123/flow_grpo: its ``sde_step_with_logprob``, by which its pipelines sample and its scripts score.

Also IamCreateAI/FlowCPS, a fork of it, whose function has an earlier signature and CPS's step.
"""

from __future__ import annotations

import inspect
import sys
from contextlib import suppress
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

import advflow_ext as af
from advflow_ext.integrations import _patching
from advflow_ext.integrations._schedules import table_of

MODULE = "flow_grpo.diffusers_patch.sd3_sde_with_logprob"
NAME = "sde_step_with_logprob"

_SAMPLERS = {"sde": "flow_sde", "cps": "cps"}
_patch = _patching.Patch("flow_grpo")


def install(exact: bool = False) -> None:
    """Replaces ``sde_step_with_logprob`` under its own signature, in its module and wherever it was imported by value.

    Same arguments, returns and conventions: Flow-SDE with its second sigma where s is 1, or CPS; means over elements,
    with ln sqrt(2 pi), or without variance for CPS; noise from the caller's generator by its own ``randn_tensor``. What
    changes: log-probabilities are float64, of the bits with which the transition was sampled, so that the log-ratio of
    an unchanged policy is 0 itself; their gradient is one launch; no call waits for the device, but for the first on a
    schedule; a deterministic step, such as noise level 0 in evaluation, has log-probability 0, where theirs is NaN.

    exact: not possible by name. The difference form needs the velocity and the noise of the rollout, two latents a
    transition, which neither this function's arguments nor its returns carry.

    Accepted are the functions of yifan123/flow_grpo at ac4c86e, and as of 9745241 and 3d02fd9 in its fork
    zhtmike/flow_grpo, and of IamCreateAI/FlowCPS at b402c7a: the signature, and the numbers on a small call. Once is
    as good as twice.

    Raises ValueError for exact=True, ImportError where flow_grpo cannot be imported, RuntimeError for a function that
    is none of those, and where something holds it out of reach.
    """
    if exact:
        raise ValueError(
            "exact is True; accepted is False: sde_step_with_logprob carries neither the rollout's velocity nor its "
            "noise. The form that stores both, two latents a transition, changes flow_grpo's pipeline and script: the "
            "patch files of advflow_ext/integrations/patches."
        )
    module = _patching.find_module("flow_grpo", MODULE)
    if _patch.replaces(module, NAME):
        return
    version = _recognized(module)
    _patch.replace([_patching.Replacement(module, NAME, version.function)])
    _patching.announce(
        "flow_grpo", f"{NAME} of {version.commits} replaced; log-probabilities are float64, nothing is stored."
    )


def uninstall() -> None:
    """Puts back what :func:`install` replaced, wherever it is; harmless without."""
    _patch.restore()


def _step(
    self: Any,
    model_output: Tensor,
    timestep: Tensor,
    sample: Tensor,
    noise_level: float,
    prev_sample: Tensor | None,
    generator: Any,
    sde_type: str,
) -> tuple[Tensor, ...]:
    if sde_type not in _SAMPLERS:
        raise ValueError(f"sde_type is {sde_type!r}; accepted are 'sde' and 'cps'.")
    table = table_of(self.sigmas, _SAMPLERS[sde_type], noise_level)
    model_output, sample = model_output.float(), sample.float()
    steps = table.index_of(torch.as_tensor(timestep, device=sample.device), scale=self.config.num_train_timesteps)
    index = steps.view(()) if steps.numel() == 1 else steps  # a pipeline asks once for all samples
    sampled = prev_sample is None
    if prev_sample is None:
        # Theirs: a seed gives the noise it gave before.
        draw = vars(sys.modules[MODULE])["randn_tensor"]
        noise = draw(model_output.shape, generator=generator, device=model_output.device, dtype=model_output.dtype)
        prev_sample = af.sde_step(model_output, sample, table, index, noise=noise).x_next
    prev_sample = prev_sample.float()
    variance = sde_type == "sde"
    log_prob = af.transition_log_prob(model_output, sample, prev_sample, table, index, variance=variance)

    columns = (column.view(-1, *[1] * (sample.dim() - 1)) for column in table.rows(steps.view(-1)))
    c_x, c_v, sigma, _, dt = columns
    sqrt_dt = (-dt).sqrt()
    mean = torch.addcmul(sample * c_x, model_output, c_v)
    if sampled and mean.requires_grad:
        prev_sample = prev_sample + (mean - mean.detach())  # the same bits, with the mean's gradient
    return prev_sample, log_prob, mean, sigma / sqrt_dt if variance else sigma, sqrt_dt


def _as_of_9745241(
    self: Any,
    model_output: Tensor,
    timestep: Tensor,
    sample: Tensor,
    noise_level: float = 0.7,
    prev_sample: Tensor | None = None,
    generator: Any = None,
    sde_type: str = "sde",
    return_sqrt_dt: bool = False,
) -> tuple[Tensor, ...]:
    results = _step(self, model_output, timestep, sample, noise_level, prev_sample, generator, sde_type)
    return results if return_sqrt_dt else results[:4]


def _as_of_3d02fd9(
    self: Any,
    model_output: Tensor,
    timestep: Tensor,
    sample: Tensor,
    noise_level: float = 0.7,
    prev_sample: Tensor | None = None,
    generator: Any = None,
    sde_type: str = "sde",
) -> tuple[Tensor, ...]:
    return _step(self, model_output, timestep, sample, noise_level, prev_sample, generator, sde_type)[:4]


def _as_of_ac4c86e(
    self: Any,
    model_output: Tensor,
    timestep: Tensor,
    sample: Tensor,
    noise_level: float = 0.7,
    prev_sample: Tensor | None = None,
    generator: Any = None,
) -> tuple[Tensor, ...]:
    return _step(self, model_output, timestep, sample, noise_level, prev_sample, generator, "sde")[:4]


def _as_of_flow_cps(
    self: Any,
    model_output: Tensor,
    timestep: Tensor,
    sample: Tensor,
    noise_level: float = 0.7,
    prev_sample: Tensor | None = None,
    generator: Any = None,
) -> tuple[Tensor, ...]:
    return _step(self, model_output, timestep, sample, noise_level, prev_sample, generator, "cps")[:4]


class _Version(NamedTuple):
    function: _patching.Function
    commits: str


_VERSIONS = (
    _Version(_as_of_9745241, "yifan123/flow_grpo as of 9745241 (zhtmike/flow_grpo)"),
    _Version(_as_of_3d02fd9, "yifan123/flow_grpo as of 3d02fd9 (zhtmike/flow_grpo)"),
    _Version(_as_of_ac4c86e, "yifan123/flow_grpo at ac4c86e"),
    _Version(_as_of_flow_cps, "IamCreateAI/FlowCPS at b402c7a"),
)


def _recognized(module: ModuleType) -> _Version:
    """Which of the functions we know the module has."""
    signatures = [_patching.signature_of(version.function) for version in _VERSIONS]
    accepted: dict[str, str] = {}
    for signature, version in zip(signatures, _VERSIONS, strict=True):
        accepted[signature] = " or ".join(filter(None, (accepted.get(signature), version.commits)))
    found = _patching.require_signature(module, NAME, accepted)
    versions = [version for signature, version in zip(signatures, _VERSIONS, strict=True) if signature == found]
    for version in versions[:-1]:
        with suppress(RuntimeError):
            _require_numbers(module, version)
            return version
    _require_numbers(module, versions[-1])
    return versions[-1]


def _require_numbers(module: ModuleType, version: _Version) -> None:
    """Compares the two functions on transitions of two steps, by each sampler they have."""
    sigmas = torch.tensor([1.0, 0.8, 0.5, 0.2, 0.0])
    timesteps = 1000 * sigmas[:-1]
    scheduler = SimpleNamespace(
        sigmas=sigmas,
        timesteps=timesteps,
        config=SimpleNamespace(num_train_timesteps=1000),
        index_for_timestep=lambda timestep: int((timesteps == timestep).nonzero()),
    )
    v, x, x_next = torch.linspace(0, 12, 48).sin().view(3, 2, 2, 2, 2)
    theirs, ours = getattr(module, NAME), version.function
    options = ({"sde_type": "sde"}, {"sde_type": "cps"}) if "sde_type" in inspect.signature(ours).parameters else ({},)
    for option in options:
        given = (scheduler, v, timesteps[[0, 2]], x)
        results = [step(*given, prev_sample=x_next, **option) for step in (theirs, ours)]
        named = zip(("prev_sample", "log_prob", "prev_sample_mean", "std_dev_t"), *results, strict=True)
        _patching.require_agreement(
            f"{MODULE}.{NAME}", version.commits, {name: (their, our) for name, their, our in named}, 1e-5
        )
