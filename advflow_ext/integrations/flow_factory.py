"""X-GenGroup/Flow-Factory: the step of its Euler scheduler, and AWM's log-probability.

::

    from advflow_ext.integrations import flow_factory
    flow_factory.install()

Read and run at a0b2bc5 (2026-05-02). What Flow-Factory does is kept: one shift of the schedule, s = timestep / 1000,
``sigmas[1]`` for s where s is 1, a drawn latent rounded to its storage dtype before it is scored, CPS's log-probability
without its variance, the noise of ``randn_tensor`` from the same generator. What changes: the log-probability is
float64, and 0 rather than NaN of a step without noise.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from advflow_ext.integrations import _patching, _steps
from advflow_ext.integrations._patching import Patch, Replacement
from advflow_ext.ops.awm import awm_log_prob_of_target

_COMMITS = "X-GenGroup/Flow-Factory at a0b2bc5"
_SCHEDULER = "flow_factory.scheduler.flow_match_euler_discrete"
_STEP = {
    "(self, noise_pred, timestep, latents, next_latents=None, timestep_next=None, generator=None, noise_level=None, "
    "compute_log_prob=True, return_dict=True, return_kwargs=['next_latents', 'next_latents_mean', 'std_dev_t', 'dt', "
    "'log_prob', 'noise_pred'], dynamics_type=None, sigma_max=None)": _COMMITS
}
_AWM = "flow_factory.trainers.awm"
_LOG_PROB = {"(model_output, target, timestep, weighting='Uniform', ghuber_power=0.25)": _COMMITS}
_WEIGHTINGS = {"Uniform": "uniform", "t": "t", "t**2": "t2", "huber": "huber", "ghuber": "ghuber"}
DYNAMICS = ("Flow-SDE", "Dance-SDE", "CPS")
_FIELDS = ("next_latents", "next_latents_mean", "noise_pred", "log_prob", "std_dev_t", "dt")

_SMALLEST = torch.finfo(torch.float32).tiny

_patch = Patch("Flow-Factory")


def install(exact: bool = False) -> None:
    """Replaces ``FlowMatchEulerDiscreteSDEScheduler.step`` and ``AWMTrainer.compute_weighted_log_prob``.

    Before the trainer is built; a second call does nothing. ``exact`` is refused: see the error.

    Raises ImportError where Flow-Factory cannot be imported, RuntimeError for one whose functions are not those we know
    or compute something else, ValueError for ``exact=True``.
    """
    if exact:
        raise ValueError(
            "exact is True; accepted for Flow-Factory is False: its GRPO carries a log-probability and two latents a "
            "step to a loss written out inside optimize(), which has no place for v_old and eps."
        )
    if _patch.installed:
        return
    scheduler = _patching.find_module("Flow-Factory", _SCHEDULER)
    awm = _patching.find_module("Flow-Factory", _AWM)
    owner = scheduler.FlowMatchEulerDiscreteSDEScheduler
    _patching.require_signature(owner, "step", _STEP)
    _patching.require_signature(awm.AWMTrainer, "compute_weighted_log_prob", _LOG_PROB)
    _require_known_step(owner)
    _patch.replace(
        [
            Replacement(owner, "step", _step),
            Replacement(awm.AWMTrainer, "compute_weighted_log_prob", _compute_weighted_log_prob),
        ]
    )


def uninstall() -> None:
    """Puts back what was there; harmless where nothing was replaced."""
    _patch.restore()


def _step(
    self: Any,
    noise_pred: Tensor,
    timestep: float | Tensor,
    latents: Tensor,
    next_latents: Tensor | None = None,
    timestep_next: float | Tensor | None = None,
    generator: Any = None,
    noise_level: float | Tensor | None = None,
    compute_log_prob: bool = True,
    return_dict: bool = True,
    return_kwargs: Any = ["next_latents", "next_latents_mean", "std_dev_t", "dt", "log_prob", "noise_pred"],  # noqa: B006
    dynamics_type: str | None = None,
    sigma_max: float | None = None,
) -> Any:
    """Waits for the device only where the trainer's own look-ups do: without timestep_next or noise_level."""
    from diffusers.utils.torch_utils import randn_tensor

    dynamics = dynamics_type or self.dynamics_type
    variance = dynamics != "CPS"
    sigma, sigma_next = _sigmas(self, timestep, timestep_next)
    if self.is_eval or dynamics == "ODE":
        noise_level = 0.0
    elif noise_level is None:
        noise_level = self.get_noise_level_for_sigma(sigma)
    steps = _steps_of(
        dynamics,
        _steps.column("timestep", sigma, latents),
        _steps.column("timestep_next", sigma_next, latents),
        _steps.column("noise_level", noise_level, latents),
        _steps.column("sigma_max", sigma_max or self.sigmas[1], latents),
        latents.shape[0],
    )
    wanted = set(return_kwargs if return_dict else _FIELDS)
    log_prob = None
    if next_latents is not None:
        if compute_log_prob and "log_prob" in wanted:
            log_prob = _steps.log_prob(noise_pred, latents, next_latents, steps, variance=variance)
    elif dynamics == "ODE":  # neither drawn nor rounded
        next_latents = _steps.mean(noise_pred, latents, steps)
        log_prob = next_latents.new_zeros(latents.shape[0], dtype=torch.float64)
    else:
        noise = randn_tensor(noise_pred.shape, generator=generator, device=noise_pred.device, dtype=torch.float32)
        next_latents, log_prob = _steps.draw(noise_pred, latents, noise, steps, latents.dtype, variance=variance)
    found = {
        "next_latents": next_latents.float(),
        "next_latents_mean": _steps.mean(noise_pred, latents, steps) if "next_latents_mean" in wanted else None,
        "noise_pred": noise_pred.float(),
        "log_prob": log_prob if compute_log_prob else None,
        "std_dev_t": _steps.per_sample(steps.std_dev_t, latents),
        "dt": _steps.per_sample(steps.dt, latents),
    }
    if not return_dict:
        return tuple(found[field] for field in _FIELDS)
    output = importlib.import_module(_SCHEDULER).SDESchedulerOutput
    return output(**{field: value for field, value in found.items() if field in wanted})


def _sigmas(scheduler: Any, timestep: Any, timestep_next: Any) -> tuple[Any, Any]:
    if timestep_next is not None:
        return timestep / 1000, timestep_next / 1000
    if isinstance(timestep, int) or (isinstance(timestep, Tensor) and not timestep.is_floating_point()):
        indices = [int(timestep)]
    else:
        times = timestep.reshape(-1) if isinstance(timestep, Tensor) else [timestep]
        indices = [scheduler.index_for_timestep(time) for time in times]
    return scheduler.sigmas[indices], scheduler.sigmas[[index + 1 for index in indices]]


def _steps_of(dynamics: str, s: Tensor, s_end: Tensor, level: Tensor, sigma_1: Tensor, samples: int) -> _steps.Steps:
    if dynamics in ("Flow-SDE", "ODE"):
        return _steps.flow_sde(s, s_end, level, sigma_1, samples)
    if dynamics == "CPS":
        return _steps.cps(s, s_end, level, samples)
    if dynamics == "Dance-SDE":
        return _steps.dance_sde(s, s_end, level, samples)
    raise ValueError(f"dynamics_type is {dynamics!r}; accepted are {', '.join(map(repr, DYNAMICS))} and 'ODE'.")


def _compute_weighted_log_prob(
    model_output: Tensor,
    target: Tensor,
    timestep: Tensor,
    weighting: str = "Uniform",
    ghuber_power: float = 0.25,
) -> Tensor:
    """Through :func:`advflow_ext.awm_log_prob`, ``[B]`` in float32 as in Flow-Factory, which computes it in float64."""
    if weighting not in _WEIGHTINGS:
        raise ValueError(f"weighting is {weighting!r}; accepted are {', '.join(map(repr, _WEIGHTINGS))}.")
    # Flow-Factory clamps at 0, which has no weight in any row but that of Uniform, which asks for no t.
    t = (timestep.detach().reshape(-1).float() / 1000).clamp(_SMALLEST, 1).expand(model_output.shape[0])
    return awm_log_prob_of_target(
        model_output, target.detach(), t, weighting=_WEIGHTINGS[weighting], power=ghuber_power
    )


def _require_known_step(owner: type) -> None:
    """Two samples of a dozen numbers through both: other releases have this signature and other conventions."""
    generator = torch.Generator()
    scheduler: Any = owner(shift=3.0)
    scheduler.set_timesteps(4)
    v, x = torch.randn(2, 2, 3, 4, generator=generator.manual_seed(0))
    results = {}
    for dynamics in DYNAMICS:
        given = {
            "timestep": scheduler.timesteps[:2],
            "timestep_next": scheduler.timesteps[1:3],
            "noise_level": 0.5,
            "return_dict": False,
            "dynamics_type": dynamics,
        }
        theirs, ours = (
            step(scheduler, v, latents=x.bfloat16(), generator=generator.manual_seed(1), **given)
            for step in (owner.step, _step)  # type: ignore[attr-defined]
        )
        for field, expected, found in zip(_FIELDS, theirs, ours, strict=True):
            results[f"{field} of {dynamics}"] = expected, found
    _patching.require_agreement(f"{_SCHEDULER}.{owner.__name__}.step", _COMMITS, results, tolerance=1e-5)
