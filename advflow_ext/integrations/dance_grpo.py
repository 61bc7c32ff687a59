"""XueZeyue/DanceGRPO: ``flux_step``, which each of its training scripts defines for itself."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from advflow_ext.integrations import _patching, _steps

NAME = "flux_step"
SCRIPTS = ("fastvideo.train_grpo_", "__main__")  # how a training script is called, imported or as the one that runs
COMMITS = "XueZeyue/DanceGRPO at 15cc71d"

_patch = _patching.Patch("DanceGRPO")


def install(exact: bool = False) -> None:
    """Replaces ``flux_step`` under its own signature in every script of DanceGRPO that is imported or runs.

    Its seven scripts define the same function, each its own, so that this is called in the script, below it: the first
    line of its ``main`` will do. Same arguments, returns and conventions: Dance-SDE, or Euler without ``sde_solver``;
    means over elements, with ln sqrt(2 pi); noise by ``torch.randn_like``. What changes: log-probabilities are float64,
    of the bits with which the transition was sampled; their gradient is one launch; no call waits for the device.

    Trajectories change where the transformer's output is half precision, as under their autocast: theirs keeps sigma
    times v in it, which costs a log-ratio a fifth of what a small update is worth, or more; ours widens v first. So the
    same seed gives other images, and whoever wants those of before has to do without this.

    exact: not possible by name, as in :func:`advflow_ext.integrations.flow_grpo.install`.

    Raises ValueError for exact=True, ImportError where no script is there, RuntimeError where ``flux_step`` is not that
    of 15cc71d, by signature and by numbers, and where something holds it out of reach.
    """
    if exact:
        raise ValueError(
            "exact is True; accepted is False: flux_step carries neither the rollout's velocity nor its noise. The "
            "form that stores both, two latents a transition, changes the script: "
            "python -m advflow_ext.integrations.patches apply dance_grpo CHECKOUT."
        )
    scripts = [module for module in _patching.imported_modules() if _is_script(module)]
    if not scripts:
        raise ImportError(
            f"DanceGRPO is not to be patched: no module that is imported defines {NAME}; accepted is an install() in "
            "its training script, below its flux_step, such as in the first line of main."
        )
    fresh = [script for script in scripts if not _patch.replaces(script, NAME)]
    for script in fresh:
        _patching.require_signature(script, NAME, {_patching.signature_of(_flux_step): COMMITS})
        _require_numbers(script)
    _patch.replace([_patching.Replacement(script, NAME, _flux_step) for script in fresh])
    for script in fresh:
        _patching.announce(
            "DanceGRPO",
            f"{NAME} of {script.__name__} replaced; log-probabilities are float64, and a half-precision velocity is "
            "widened before it is multiplied, so that seeds give other trajectories than before.",
        )


def uninstall() -> None:
    """Puts back what :func:`install` replaced, wherever it is; harmless without."""
    _patch.restore()


def ends_of(sigmas: Tensor, index: int | Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Where a step begins and ends, float64 [] on the device of x, which is not waited for."""
    values = sigmas.to(x.device, torch.float64, non_blocking=True)
    if isinstance(index, Tensor):
        at = index.to(x.device, torch.int64, non_blocking=True).view(1)
        return values.index_select(0, at).view(()), values.index_select(0, at + 1).view(())
    return values[index], values[index + 1]


def predicted_x0(v: Tensor, x: Tensor, s: Tensor) -> Tensor:
    """x - s v, with gradient to both."""
    return torch.addcmul(x, v, s.to(x.dtype), value=-1)


def dance_step(
    model_output: Tensor,
    latents: Tensor,
    eta: float,
    sigmas: Tensor,
    index: int | Tensor,
    prev_sample: Tensor | None,
    grpo: bool,
    sde_solver: bool,
) -> tuple[tuple[Tensor, ...], _steps.Steps]:
    """What flux_step returns, which Tencent-Hunyuan/MixGRPO calls dance_grpo_step, and its transitions."""
    s, s_end = ends_of(sigmas, index, latents)
    steps = _steps.dance_sde(s, s_end, eta if sde_solver else 0.0, len(latents))
    pred_original = predicted_x0(model_output, latents, s)
    if not grpo:
        return (_steps.mean(model_output, latents, steps), pred_original), steps
    if prev_sample is None:
        noise = torch.randn_like(latents) if sde_solver else torch.zeros_like(latents)
        prev_sample, log_prob = _steps.draw(model_output, latents, noise, steps, latents.dtype)
    else:
        log_prob = _steps.log_prob(model_output, latents, prev_sample, steps)
    return (prev_sample, pred_original, log_prob), steps


def _flux_step(
    model_output: Tensor,
    latents: Tensor,
    eta: float,
    sigmas: Tensor,
    index: int | Tensor,
    prev_sample: Tensor | None,
    grpo: bool,
    sde_solver: bool,
) -> tuple[Tensor, ...]:
    if grpo and not sde_solver:
        raise ValueError(
            "sde_solver is False and grpo True; accepted are both: DanceGRPO adds noise there to an Euler step, which "
            "no sampler here has."
        )
    return dance_step(model_output, latents, eta, sigmas, index, prev_sample, grpo, sde_solver)[0]


def _is_script(module: ModuleType) -> bool:
    """Whether the module defines a flux_step, and is a training script of DanceGRPO or the one that runs."""
    if not module.__name__.startswith(SCRIPTS):
        return False
    held = vars(module).get(NAME)
    return callable(held) and (getattr(held, "__globals__", None) is vars(module) or _patch.replaces(module, NAME))


def _require_numbers(script: ModuleType) -> None:
    sigmas = torch.tensor([1.0, 0.8, 0.5, 0.2, 0.0])
    v, x, x_next = torch.linspace(0, 12, 48).sin().view(3, 2, 4, 2)
    for index in (0, 2):
        results = [
            step(v, x, 0.3, sigmas, index, prev_sample=x_next, grpo=True, sde_solver=True)
            for step in (getattr(script, NAME), _flux_step)
        ]
        returned = ("prev_sample", "pred_original_sample", "log_prob")
        found = {word: (theirs, ours) for word, theirs, ours in zip(returned, *results, strict=True)}
        _patching.require_agreement(f"{script.__name__}.{NAME}", COMMITS, found, 1e-5)
