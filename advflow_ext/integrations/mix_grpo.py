"""Tencent-Hunyuan/MixGRPO: ``flow_grpo_step`` and ``dance_grpo_step`` of its ``fastvideo.utils.sampling_utils``."""

from __future__ import annotations

import math
import sys
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from advflow_ext.integrations import _patching, _steps
from advflow_ext.integrations.dance_grpo import dance_step, ends_of, predicted_x0

MODULE = "fastvideo.utils.sampling_utils"
COMMITS = "Tencent-Hunyuan/MixGRPO at e5cdd6a"

_patch = _patching.Patch("MixGRPO")


def install(exact: bool = False) -> None:
    """Replaces ``flow_grpo_step`` and ``dance_grpo_step`` under their own signatures, wherever they were imported.

    Same arguments, returns and conventions: Flow-SDE with the second sigma where s is 1, or Dance-SDE, whose
    log-probability lacks its constants as theirs does; Euler for a deterministic step; noise by the trainer's own
    ``randn_tensor`` or ``torch.randn_like``. What changes: log-probabilities are float64, of the bits with which the
    transition was sampled; their gradient is one launch; no call waits for the device.

    Trajectories change where the transformer's output is half precision, as under their autocast: theirs keeps sigma
    times v, and ``flow_grpo_step`` its noise, in it, which costs a log-ratio more than a small update is worth; ours
    widens v first. So the same seed gives other images, and whoever wants those of before has to do without this.

    The SDE of its dpmsolver (``dpm_step`` with ``sde_solver``) has no sampler here and is refused while this is
    installed, rather than left as it was by somebody who asked for exact numbers; its ODE stays.

    exact: not possible by name, as in :func:`advflow_ext.integrations.flow_grpo.install`.

    Raises ValueError for exact=True, ImportError where MixGRPO cannot be imported, RuntimeError for functions that are
    not those of e5cdd6a, by signature and by numbers, and where something holds one out of reach.
    """
    if exact:
        raise ValueError(
            "exact is True; accepted is False: MixGRPO's steps carry neither the rollout's velocity nor its noise, and "
            "its script stores none."
        )
    module = _patching.find_module("MixGRPO", MODULE)
    if _patch.installed:
        return
    for name, function in _REPLACEMENTS.items():
        _patching.require_signature(module, name, {_patching.signature_of(function): COMMITS})
    _require_numbers(module)
    _patch.replace([_patching.Replacement(module, name, function) for name, function in _REPLACEMENTS.items()])
    _patching.announce(
        "MixGRPO",
        "flow_grpo_step and dance_grpo_step replaced; log-probabilities are float64, and a half-precision velocity is "
        "widened before it is multiplied, so that seeds give other trajectories than before.",
    )


def uninstall() -> None:
    """Puts back what :func:`install` replaced, wherever it is; harmless without."""
    _patch.restore()


def _flow_grpo_step(
    model_output: Tensor,
    latents: Tensor,
    eta: float,
    sigmas: Tensor,
    index: int | Tensor,
    prev_sample: Tensor | None,
    generator: Any = None,
    determistic: bool = False,
) -> tuple[Tensor, ...]:
    if prev_sample is not None and generator is not None:
        raise ValueError("prev_sample and generator are both given; accepted is one of them.")
    s, s_end = ends_of(sigmas, index, latents)
    steps = _steps.flow_sde(s, s_end, eta, ends_of(sigmas, 0, latents)[1], len(latents))
    if prev_sample is None:
        # Theirs, and drawn for a deterministic step too: a seed gives the noise it gave before.
        draw = vars(sys.modules[MODULE])["randn_tensor"]
        noise = draw(model_output.shape, generator=generator, device=latents.device, dtype=model_output.dtype)
    if determistic:
        prev_sample = torch.addcmul(latents, model_output, steps.dt.to(latents.dtype))
    if prev_sample is None:
        prev_sample, log_prob = _steps.draw(model_output, latents, noise, steps, latents.dtype)
    else:
        log_prob = _steps.log_prob(model_output, latents, prev_sample, steps)
    mean, std = _steps.mean(model_output, latents, steps), steps.rows.sigma[0]
    return prev_sample, predicted_x0(model_output, latents, s), log_prob, mean, std


def _dance_grpo_step(
    model_output: Tensor,
    latents: Tensor,
    eta: float,
    sigmas: Tensor,
    index: int | Tensor,
    prev_sample: Tensor | None,
    grpo: bool,
    sde_solver: bool,
) -> tuple[Tensor, ...]:
    results, steps = dance_step(model_output, latents, eta, sigmas, index, prev_sample, grpo, sde_solver)
    if not (grpo and sde_solver):
        return results
    following, pred_original, log_prob = results
    # Their constants are a statement of their own, and dropped.
    return following, pred_original, log_prob + steps.rows.sigma.double().log() + math.log(2 * math.pi) / 2


def _dpm_step(
    args: Any,
    model_output: Tensor,
    sample: Tensor,
    step_index: int,
    timesteps: Any,
    sigmas: Tensor,
    dpm_state: Any = None,
    generator: Any = None,
    variance_noise: Tensor | None = None,
    sde_solver: bool = False,
) -> Any:
    if sde_solver:
        raise ValueError(
            "sde_solver is True; accepted is False while advflow_ext is installed in MixGRPO, which has no SDE of "
            "dpmsolver: set dpm_algorithm_type to null or dpm_apply_strategy to post, or uninstall()."
        )
    theirs = _patch.original(sys.modules[MODULE], "dpm_step")
    return theirs(
        args, model_output, sample, step_index, timesteps, sigmas, dpm_state, generator, variance_noise, sde_solver
    )


_REPLACEMENTS: dict[str, _patching.Function] = {
    "flow_grpo_step": _flow_grpo_step,
    "dance_grpo_step": _dance_grpo_step,
    "dpm_step": _dpm_step,
}


def _require_numbers(module: ModuleType) -> None:
    """Compares the two steps on transitions of two places, inside a window and outside."""
    sigmas = torch.tensor([1.0, 0.8, 0.5, 0.2, 0.0])
    v, x, x_next = torch.linspace(0, 12, 48).sin().view(3, 2, 4, 2)
    returned = ("prev_sample", "pred_original_sample", "log_prob", "prev_sample_mean", "std_dev_t")
    calls = [("flow_grpo_step", {"determistic": value}) for value in (False, True)]
    calls += [("dance_grpo_step", {"grpo": True, "sde_solver": True})]
    for (name, options), index in [(call, index) for call in calls for index in (0, 2)]:
        results = [
            step(v, x, 0.7, sigmas, index, prev_sample=x_next, **options)
            for step in (getattr(module, name), _REPLACEMENTS[name])
        ]
        found = {word: (theirs, ours) for word, theirs, ours in zip(returned, *results, strict=False)}
        _patching.require_agreement(f"{MODULE}.{name}", COMMITS, found, 1e-5)
