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

from advflow_ext.contract.numbers import values_are_at_hand
from advflow_ext.integrations import _patching, _steps

MODULE = "flow_grpo.diffusers_patch.sd3_sde_with_logprob"
NAME = "sde_step_with_logprob"

_patch = _patching.Patch("flow_grpo")


def install(exact: bool = False) -> None:
    """Replaces ``sde_step_with_logprob`` under its own signature, in its module and wherever it was imported by value.

    Same arguments, returns and conventions: Flow-SDE with its second sigma where s is 1, or CPS; means over elements,
    with ln sqrt(2 pi), or without variance for CPS; noise from the caller's generator by its own ``randn_tensor``. What
    changes: log-probabilities are float64, of the bits with which the transition was sampled, so that the log-ratio of
    an unchanged policy is 0 itself; their gradient is one launch; no call waits for the device; a deterministic step,
    such as noise level 0 in evaluation, has log-probability 0, where theirs of Flow-SDE is NaN.

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
            "noise. The form that stores both, two latents a transition, changes flow_grpo's pipeline and script: "
            "python -m advflow_ext.integrations.patches apply flow_grpo CHECKOUT."
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
    if sde_type not in ("sde", "cps"):
        raise ValueError(f"sde_type is {sde_type!r}; accepted are 'sde' and 'cps'.")
    model_output, sample = model_output.float(), sample.float()
    s, s_end, sigma_1 = _sigmas_of(self, timestep, sample)
    variance = sde_type == "sde"
    if variance:
        steps = _steps.flow_sde(s, s_end, noise_level, sigma_1, len(sample))
    else:
        steps = _steps.cps(s, s_end, noise_level, len(sample))
    if prev_sample is None:
        # Theirs: a seed gives the noise it gave before.
        draw = vars(sys.modules[MODULE])["randn_tensor"]
        noise = draw(model_output.shape, generator=generator, device=model_output.device, dtype=model_output.dtype)
        prev_sample, log_prob = _steps.draw(model_output, sample, noise, steps, sample.dtype, variance=variance)
    else:
        prev_sample = prev_sample.float()
        log_prob = _steps.log_prob(model_output, sample, prev_sample, steps, variance=variance)
    mean = _steps.mean(model_output, sample, steps)
    std_dev_t, sqrt_dt = (
        number.float().view(-1, *[1] * (sample.dim() - 1)) for number in (steps.std_dev_t, (-steps.dt).sqrt())
    )
    return prev_sample, log_prob, mean, std_dev_t, sqrt_dt


def _sigmas_of(scheduler: Any, timestep: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where the steps of these timesteps begin and end, and the second sigma; float64 on the device of x, which is not
    waited for. A timestep that is not the scheduler's is refused where it can be seen, and elsewhere gives NaN."""
    sigmas, timesteps = (
        each.to(x.device, torch.float64, non_blocking=True) for each in (scheduler.sigmas, scheduler.timesteps)
    )
    given = torch.as_tensor(timestep, device=x.device).view(-1, 1)
    distance, index = (given - timesteps).abs().min(1)
    known = distance < 0.5
    if values_are_at_hand(known) and not known.all():
        raise ValueError(f"timestep is {given.flatten().tolist()}; accepted are the scheduler's, {timesteps.tolist()}.")
    s = torch.where(known, sigmas.index_select(0, index), torch.nan)
    s, s_end = (_steps.column("timestep", each, x) for each in (s, sigmas.index_select(0, index + 1)))
    return s, s_end, sigmas[1]


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
        index_for_timestep=lambda timestep: int((timesteps == timestep).nonzero()),
    )
    v, x, x_next = torch.linspace(0, 12, 48).sin().view(3, 2, 2, 2, 2)
    theirs, ours = getattr(module, NAME), version.function
    options = ({"sde_type": "sde"}, {"sde_type": "cps"}) if "sde_type" in inspect.signature(ours).parameters else ({},)
    for option in options:
        given = (scheduler, v, timesteps[[0, 2]], x)
        results = [step(*given, prev_sample=x_next, **option) for step in (theirs, ours)]
        returned = ("prev_sample", "log_prob", "prev_sample_mean", "std_dev_t")
        found = {word: (their, our) for word, their, our in zip(returned, *results, strict=True)}
        _patching.require_agreement(f"{MODULE}.{NAME}", version.commits, found, 1e-5)
