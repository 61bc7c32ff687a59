"""verl-project/verl-omni: the transition its scheduler samples and scores by, and the dtype of its log-probabilities.

::

    from advflow_ext.integrations import verl_omni
    verl_omni.install()

Read and run at a1139ba (2026-08-22). What verl-omni does is kept: ``sigmas[1]`` for s where s is 1, a noise level for
each sample, CPS's log-probability without its variance, ``include_logprob_normalizer``, the noise of ``randn_tensor``
from the same generators; its Flow-GRPO, Flow-DPPO and GRPO-Guard losses stay untouched. What changes: the
log-probability is float64, and 0 rather than NaN of a step without noise.

Its trainer, in a process of its own, casts the old log-probabilities to float32. Where ``install()`` ran there too,
they stay float64; where it did not, the new ones are cast like them, so that an unchanged policy has a log-ratio of 0
either way.
"""

from __future__ import annotations

import importlib
import math
import sys
import warnings
from typing import Any

import torch
from torch import Tensor

from advflow_ext.contract.numbers import values_are_at_hand
from advflow_ext.integrations import _patching, _steps
from advflow_ext.integrations._patching import Patch, Replacement

_COMMITS = "verl-project/verl-omni at a1139ba"
_SCHEDULER = "verl_omni.pipelines.schedulers.flow_match_sde"
_STEP = {
    "(self, sample, model_output, timestep=None, generator=None, per_token_timesteps=None, noise_level=0.7, "
    "prev_sample=None, sde_type='sde', return_logprobs=True, return_sqrt_dt=False, include_logprob_normalizer=True)": (
        _COMMITS
    )
}
# In a worker, one of the engines that it has; in the driver, one of the trainers.
_OUTPUTS = {"(self, output, micro_batch)": _COMMITS}
_ENGINES = (
    ("verl_omni.workers.engine.fsdp.diffusers_impl", "PPODiffusersFSDPEngine"),
    ("verl_omni.workers.engine.veomni.diffusion_impl", "VeOmniDiffusionEngine"),
)
_OLD = {"(self, batch)": _COMMITS, "(self, data)": _COMMITS}
_TRAINERS = (
    ("verl_omni.trainer.diffusion.ray_diffusion_trainer", "PolicyGradientRayTrainer"),
    ("verl_omni.trainer.diffusion.v1.trainer_base", "PolicyGradientDiffusionTrainerV1"),
)
_FIELDS = ("prev_sample", "log_prob", "prev_sample_mean", "std_dev_t", "sqrt_dt")
SAMPLERS = ("sde", "dance_sde", "cps")

_patch = Patch("verl-omni")


def install(exact: bool = False) -> None:
    """Replaces ``FlowMatchSDEDiscreteScheduler.sample_previous_step``, and wraps what hands its log-probabilities on.

    Wrapped are ``prepare_model_outputs`` of the engines and ``_compute_old_log_prob`` of the trainers that can be
    imported here. verl-omni runs a driver and workers as processes of their own: install in each, in the workers by
    ``external_lib`` of the model's configuration. A second call does nothing. ``exact`` is refused: see the error.

    Raises ImportError where verl-omni cannot be imported, RuntimeError for one whose functions are not those we know or
    compute something else, ValueError for ``exact=True``.
    """
    if exact:
        raise ValueError(
            "exact is True; accepted for verl-omni is False: its loss classes read log-probabilities and means alone, "
            "so that v_old and eps would reach no loss."
        )
    if _patch.installed:
        return
    owner = _patching.find_module("verl-omni", _SCHEDULER).FlowMatchSDEDiscreteScheduler
    _patching.require_signature(owner, "sample_previous_step", _STEP)
    _require_known_step(owner)
    replacements = [Replacement(owner, "sample_previous_step", _sample_previous_step)]
    for module, name in _ENGINES:
        if engine := _class_of(module, name):
            _patching.require_signature(engine, "prepare_model_outputs", _OUTPUTS)
            replacements.append(Replacement(engine, "prepare_model_outputs", _prepare_model_outputs))
    for module, name in _TRAINERS:
        if trainer := _class_of(module, name):
            signature = _patching.require_signature(trainer, "_compute_old_log_prob", _OLD)
            replacement = _old_log_prob_of_data if "data" in signature else _old_log_prob_of_batch
            replacements.append(Replacement(trainer, "_compute_old_log_prob", replacement))
    _patch.replace(replacements)


def uninstall() -> None:
    """Puts back what was there; harmless where nothing was replaced."""
    _patch.restore()


def _class_of(module: str, name: str) -> Any:
    """None where this process has not what the module needs, and so does not use it."""
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError:
        return None


def _sample_previous_step(
    self: Any,
    sample: Tensor,
    model_output: Tensor,
    timestep: Tensor | None = None,
    generator: Any = None,
    per_token_timesteps: Tensor | None = None,
    noise_level: float | Tensor = 0.7,
    prev_sample: Tensor | None = None,
    sde_type: str = "sde",
    return_logprobs: bool = True,
    return_sqrt_dt: bool = False,
    include_logprob_normalizer: bool = True,
) -> tuple[Tensor | None, ...]:
    from diffusers.utils.torch_utils import randn_tensor

    if per_token_timesteps is not None:
        raise NotImplementedError("per_token_timesteps is given; accepted by verl-omni's scheduler is None.")
    for name, latent in (("sample", sample), ("prev_sample", prev_sample), ("model_output", model_output)):
        if latent is not None and latent.dtype != torch.float32:
            raise ValueError(f"{name} is {latent.dtype}; accepted is float32.")
    s, s_end = _sigmas(self, timestep, sample)
    level = _steps.column("noise_level", noise_level, sample)
    steps = _steps_of(sde_type, s, s_end, level, _steps.column("sigmas[1]", self.sigmas[1], sample), sample.shape[0])
    variance = sde_type != "cps"
    log_prob = None
    if prev_sample is None:
        shape, device = model_output.shape, model_output.device
        noise = randn_tensor(shape, generator=generator, device=device, dtype=model_output.dtype)
        prev_sample, log_prob = _steps.draw(model_output, sample, noise, steps, torch.float32, variance=variance)
    elif return_logprobs:
        log_prob = _steps.log_prob(model_output, sample, prev_sample, steps, variance=variance)
    if log_prob is not None and variance and not include_logprob_normalizer:
        sigma = steps.rows.sigma.double()
        log_prob = log_prob + torch.where(sigma > 0, sigma.log() + math.log(2 * math.pi) / 2, 0)
    root = (-steps.dt).sqrt()
    std_dev_t = steps.sigma if sde_type == "dance_sde" else steps.std_dev_t
    if timestep is None and not (isinstance(noise_level, Tensor) and noise_level.dim()):
        std_dev_t = std_dev_t.float()
    else:
        std_dev_t = _steps.per_sample(std_dev_t, sample)
    log_prob = log_prob if return_logprobs else None
    found = prev_sample, log_prob, _steps.mean(model_output, sample, steps), std_dev_t
    if not return_sqrt_dt:
        return found
    return *found, root.float().expand(sample.shape[0]).clone()


def _sigmas(scheduler: Any, timestep: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor]:
    """Where the step begins and ends, looked up on the device; NaN on CUDA where the scheduler has no such timestep."""
    sigmas = scheduler.sigmas.to(x.device, torch.float64, non_blocking=True)
    if timestep is None:
        return sigmas[scheduler.step_index], sigmas[scheduler.step_index + 1]
    times = scheduler.timesteps.to(x.device, non_blocking=True)
    equal = timestep.to(x.device, non_blocking=True).reshape(-1, 1) == times
    found, index = equal.any(1), equal.int().argmax(1)
    if values_are_at_hand(found) and not found.all():
        raise ValueError(f"timestep is {timestep.tolist()}; accepted are those of the scheduler, {times.tolist()}.")
    return torch.where(found, sigmas[index], torch.nan), sigmas[index + 1]


def _steps_of(sde_type: str, s: Tensor, s_end: Tensor, level: Tensor, sigma_1: Tensor, samples: int) -> _steps.Steps:
    if sde_type == "sde":
        return _steps.flow_sde(s, s_end, level, sigma_1, samples)
    if sde_type == "cps":
        return _steps.cps(s, s_end, level, samples)
    if sde_type == "dance_sde":
        return _steps.dance_sde(s, s_end, level, samples)
    raise ValueError(f"sde_type is {sde_type!r}; accepted are {', '.join(map(repr, SAMPLERS))}.")


def _prepare_model_outputs(self: Any, output: Any, micro_batch: Any) -> dict[str, Any]:
    """The engine's own, with the new log-probabilities in the dtype in which the old ones came back."""
    owner = next(each for each in type(self).__mro__ if _patch.replaces(each, "prepare_model_outputs"))
    found: dict[str, Any] = _patch.original(owner, "prepare_model_outputs")(self, output, micro_batch)
    old = micro_batch.get("old_log_probs", None)
    if old is not None and found["log_probs"].dtype != old.dtype:
        _warn_of_cast(old.dtype)
        found["log_probs"] = found["log_probs"].to(old.dtype)
    return found


def _warn_of_cast(dtype: torch.dtype) -> None:
    warnings.warn(
        f"verl-omni's trainer has cast old_log_probs to {dtype}, which costs two of their digits, and the new ones are "
        "cast likewise; advflow_ext.integrations.verl_omni.install() in the driver's process keeps float64.",
        RuntimeWarning,
        stacklevel=3,
    )


class _Listening:
    """A group of workers, of whose answers the last is kept."""

    def __init__(self, workers: Any) -> None:
        self._workers, self.answer = workers, None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._workers, name)

    def infer_actor_batch(self, *given: Any, **named: Any) -> Any:
        self.answer = self._workers.infer_actor_batch(*given, **named)
        return self.answer


def _old_log_prob_of_batch(self: Any, batch: Any) -> Any:
    """The ray trainer's own, without its cast."""
    return _uncast(self, batch)


def _old_log_prob_of_data(self: Any, data: Any) -> Any:
    """The same of the trainer under v1."""
    return _uncast(self, data)


def _uncast(trainer: Any, batch: Any) -> Any:
    owner = next(each for each in type(trainer).__mro__ if _patch.replaces(each, "_compute_old_log_prob"))
    workers = trainer.actor_rollout_wg
    trainer.actor_rollout_wg = listening = _Listening(workers)
    try:
        found = _patch.original(owner, "_compute_old_log_prob")(trainer, batch)
    finally:
        trainer.actor_rollout_wg = workers
    kept = found[0] if isinstance(found, tuple) else found
    kept.batch["old_log_probs"] = sys.modules[owner.__module__].tu.get(listening.answer, "log_probs")
    return found


def _require_known_step(owner: Any) -> None:
    """Two samples of a dozen numbers through both: other releases have this signature and other conventions."""
    generator = torch.Generator()
    scheduler = owner(shift=3.0)
    scheduler.set_timesteps(4)
    v, x = torch.randn(2, 2, 3, 4, generator=generator.manual_seed(0))
    results = {}
    for sampler in SAMPLERS:
        given = {"timestep": scheduler.timesteps[:2], "noise_level": 0.5, "sde_type": sampler, "return_sqrt_dt": True}
        theirs, ours = (
            step(scheduler, x, v, generator=generator.manual_seed(1), **given)
            for step in (owner.sample_previous_step, _sample_previous_step)
        )
        for field, expected, found in zip(_FIELDS, theirs, ours, strict=True):
            results[f"{field} of {sampler}"] = expected, found
    _patching.require_agreement(f"{_SCHEDULER}.{owner.__name__}.sample_previous_step", _COMMITS, results, 1e-5)
