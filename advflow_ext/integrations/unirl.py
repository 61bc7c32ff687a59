"""Tencent-Hunyuan/UniRL: the transition that its stages sample and replay by, and Flow-DPPO's trust region.

::

    from advflow_ext.integrations import unirl
    unirl.install()

Read and run at 1a7b501 (2026-06-13). What UniRL does is kept: ``sigma_max`` for s where s is 1, a latent rounded to
the dtype of the trajectory before it is scored, CPS's log-probability without its variance, no log-probability without
noise, Flow-DPPO's own sigma in its KL, a KL equal to the threshold masked. What changes: log-probabilities are float64
until UniRL casts them, and Flow-DPPO of that commit compares velocities where it compared means rounded to the
trajectory's dtype. It keeps them in ``segment.sde_means``, which has their shape.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor

from advflow_ext.integrations import _patching, _steps
from advflow_ext.integrations._patching import Patch, Replacement
from advflow_ext.integrations._ratio import log_ratio

_KERNELS, _DPPO = "unirl.sde.kernels", "unirl.algorithms.flowdppo"
_DENOISE = {
    "(self, noise_pred, sample, sigma, sigma_next, *, eta=1.0, prev_sample=None, sigma_max=0.99, step_index=0)": (
        "Tencent-Hunyuan/UniRL at 1a7b501"
    ),
    "(self, noise_pred, sample, sigma, sigma_next, *, eta=1.0, prev_sample=None, generator=None, sigma_max=0.99, "
    "step_index=0)": "Tencent-Hunyuan/UniRL at 4154868",
}
_PREPARE = {"(self, *, conditions, segment)": "Tencent-Hunyuan/UniRL at 1a7b501"}
_LOSS = {
    "(self, *, conditions, segment, advantages, training_progress, loss_scale)": "Tencent-Hunyuan/UniRL at 1a7b501"
}
_STRATEGIES = ("FlowSDEStrategy", "CPSSDEStrategy", "DanceSDEStrategy")
_LEAST_ETA = 1e-7  # below it UniRL takes a step for deterministic

_patch = Patch("UniRL")


class _Transition(NamedTuple):
    """One replayed step of a batch."""

    v: Tensor
    x: Tensor
    x_next: Tensor
    steps: _steps.Steps
    log_prob: Tensor  # [B], float64


_watched: ContextVar[list[_Transition] | None] = ContextVar("replayed transitions", default=None)


def install(exact: bool = False) -> None:
    """Replaces ``StepStrategy.denoise`` for UniRL's three SDE strategies, and two methods of ``FlowDPPO``.

    Before the pipeline is built, in every process; a second call does nothing. A strategy of your own keeps UniRL's.
    ``FlowDPPO`` of later commits, which keeps its means in float32, stays untouched. ``exact`` is refused: see the
    error. Warns of where UniRL casts log-probabilities down.

    Raises ImportError where UniRL cannot be imported, RuntimeError for one whose functions are not those we know or
    compute something else, ValueError for ``exact=True``.
    """
    if exact:
        raise ValueError(
            "exact is True; accepted for UniRL is False: FlowGRPO keeps a log-probability a step and no other field of "
            "a segment would be cut with it, and FlowDPPO has what it needs, since velocities replace its means."
        )
    if _patch.installed:
        return
    kernels = _patching.find_module("UniRL", _KERNELS)
    dppo = _patching.find_module("UniRL", _DPPO).FlowDPPO
    signature = _patching.require_signature(kernels.StepStrategy, "denoise", _DENOISE)
    denoise = _denoise_with_generator if "generator" in signature else _denoise
    _require_known_strategies(kernels, denoise)
    replacements = [Replacement(kernels.StepStrategy, "denoise", denoise)]
    if not hasattr(kernels.SDEStrategy, "transition_std"):  # with it came means in float32
        _patching.require_signature(dppo, "prepare_segment", _PREPARE)
        _patching.require_signature(dppo, "compute_loss_and_backward", _LOSS)
        replacements += [
            Replacement(dppo, "prepare_segment", _prepare_segment),
            Replacement(dppo, "compute_loss_and_backward", _compute_loss_and_backward),
        ]
    _patch.replace(replacements)
    warnings.warn(
        "UniRL casts log-probabilities to its logprob_precision, float32 unless you say otherwise, which costs two of "
        "their digits; give your stage logprob_precision=torch.float64, and FlowDPPO old_logp_source='replay', which "
        "keeps its own in float64.",
        RuntimeWarning,
        stacklevel=2,
    )


def uninstall() -> None:
    """Puts back what was there; harmless where nothing was replaced."""
    _patch.restore()


def _denoise(
    self: Any,
    noise_pred: Tensor,
    sample: Tensor,
    sigma: Tensor,
    sigma_next: Tensor,
    *,
    eta: float = 1.0,
    prev_sample: Tensor | None = None,
    sigma_max: float | Tensor = 0.99,
    step_index: int = 0,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    more = {"eta": eta, "prev_sample": prev_sample, "sigma_max": sigma_max, "step_index": step_index}
    return _denoised(self, noise_pred, sample, sigma, sigma_next, more)


def _denoise_with_generator(
    self: Any,
    noise_pred: Tensor,
    sample: Tensor,
    sigma: Tensor,
    sigma_next: Tensor,
    *,
    eta: float = 1.0,
    prev_sample: Tensor | None = None,
    generator: Any = None,
    sigma_max: float | Tensor = 0.99,
    step_index: int = 0,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    more = {"eta": eta, "prev_sample": prev_sample, "sigma_max": sigma_max, "step_index": step_index}
    return _denoised(self, noise_pred, sample, sigma, sigma_next, {**more, "generator": generator})


def _denoised(
    strategy: Any, v: Tensor, x: Tensor, sigma: Tensor, sigma_next: Tensor, more: dict[str, Any]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    kernels = importlib.import_module(_KERNELS)
    if not _is_ours(strategy):
        theirs: tuple[Tensor, Tensor | None, Tensor | None] = _patch.original(kernels.StepStrategy, "denoise")(
            strategy, v, x, sigma, sigma_next, **more
        )
        return theirs
    from diffusers.utils.torch_utils import randn_tensor

    eta, x_next = more["eta"], more["prev_sample"]
    steps = _steps_of(strategy, sigma, sigma_next, eta, more["sigma_max"], x)
    variance = _has_variance(strategy)
    if x_next is None:
        noise = randn_tensor(v.shape, generator=more.get("generator"), device=v.device, dtype=torch.float32)
        x_next, log_prob = _steps.draw(v, x, noise, steps, x.dtype, variance=variance)
    else:
        x_next = x_next.to(x.dtype)
        log_prob = _steps.log_prob(v, x, x_next, steps, variance=variance)
    expected = _steps.mean(v, x, steps)
    if eta < _LEAST_ETA:
        given = more["prev_sample"]
        return expected if given is None else given.float(), None, expected
    if (watched := _watched.get()) is not None:
        watched.append(_Transition(v, x, x_next, steps, log_prob))
    return x_next.float(), log_prob, expected


def _is_ours(strategy: object) -> bool:
    return type(strategy).__module__ == _KERNELS and type(strategy).__name__ in _STRATEGIES


def _has_variance(strategy: object) -> bool:
    return type(strategy).__name__ != "CPSSDEStrategy"


def _steps_of(
    strategy: object, sigma: Tensor, sigma_next: Tensor, eta: float, sigma_max: float | Tensor, x: Tensor
) -> _steps.Steps:
    # float32 like sglang's: a float64 schedule would make other coefficients in the trainer than in that rollout.
    s, s_end = (_steps.column("sigma", number.float(), x) for number in (sigma, sigma_next))
    name, samples = type(strategy).__name__, x.shape[0]
    if name == "CPSSDEStrategy":
        return _steps.cps(s, s_end, eta, samples)
    if name == "DanceSDEStrategy":
        return _steps.dance_sde(s, s_end, eta, samples)
    return _steps.flow_sde(s, s_end, eta, _steps.column("sigma_max", sigma_max, x), samples)


@contextmanager
def _watch() -> Iterator[list[_Transition]]:
    """The transitions that are replayed within: a stage hands back their means, and rounded."""
    watched: list[_Transition] = []
    token = _watched.set(watched)
    try:
        yield watched
    finally:
        _watched.reset(token)


def _prepare_segment(self: Any, *, conditions: Mapping[str, Any], segment: Any) -> None:
    """UniRL's own, which replays the rollout policy; of that its velocities are kept, not their rounded means."""
    module = importlib.import_module(_DPPO)
    with _watch() as old:
        _patch.original(module.FlowDPPO, "prepare_segment")(self, conditions=conditions, segment=segment)
    if not old:
        return
    segment.sde_means = torch.stack([step.v for step in old], 1).detach().cpu()
    if self.old_logp_source == "replay":
        segment.sde_logp = torch.stack([step.log_prob for step in old], 1).detach().cpu()


def _compute_loss_and_backward(
    self: Any,
    *,
    conditions: Mapping[str, Any],
    segment: Any,
    advantages: Tensor,
    training_progress: float,
    loss_scale: float,
) -> Any:
    """Flow-DPPO's loss from the difference of velocities, KL = <(c_v (v - v_old))^2> / (2 sigma_t^2), sigma_t UniRL's.

    One wait for all metrics together.
    """
    module = importlib.import_module(_DPPO)
    target = self._resolve_target_steps(segment)
    if not target or not _is_ours(getattr(self.stage, "strategy", None)):
        return _patch.original(module.FlowDPPO, "compute_loss_and_backward")(
            self,
            conditions=conditions,
            segment=segment,
            advantages=advantages,
            training_progress=training_progress,
            loss_scale=loss_scale,
        )
    typed = module.typed_conditions(conditions, self.conditions_cls)
    with _watch() as new:
        self.stage.replay(typed, segment=segment, params=self.params, step_indices=target)
    old, emitted = (
        module.gather_sde_field(getattr(segment, name), segment.sde_indices, target, field_name=name).to(
            new[0].v.device
        )
        for name in ("sde_means", "sde_logp")
    )
    compared = [
        _compared(step, old[:, j], emitted[:, j], _has_variance(self.stage.strategy)) for j, step in enumerate(new)
    ]
    change, square = (torch.stack(each, 1) for each in zip(*compared, strict=True))
    sigma = self._compute_sigma_t(segment, target, device=change.device).reshape(1, -1).double()
    kl = square / (2 * sigma.square())
    A = advantages.detach().to(change).reshape(-1, 1).expand_as(change)
    far = kl >= self.kl_mask_threshold
    rising, falling = far & (change > 0) & (A > 0), far & (change < 0) & (A < 0)
    ratio = change.exp()
    loss = torch.where(rising | falling, 0, -A * ratio).mean()
    (loss * loss_scale).backward()
    metrics = _metrics(loss, change.detach(), kl, far, rising, falling)
    return module.AlgorithmStepResult(
        loss=metrics["policy_loss"],
        metrics={**metrics, "kl_mask_threshold": float(self.kl_mask_threshold)},
        num_steps_or_tokens=len(target),
        has_backward=True,
    )


def _compared(step: _Transition, v_old: Tensor, emitted: Tensor, variance: bool) -> tuple[Tensor, Tensor]:
    """The log-ratio to the rollout policy, and <(c_v (v - v_old))^2>; float64 ``[B]``.

    Its log-probability is the one that was ``emitted``, which may be another engine's.
    """
    c_v, sigma = (column.double() for column in step.steps.rows[1:])
    eps = _steps.noise(v_old, step.x, step.x_next, step.steps)
    found, square = log_ratio(step.v, v_old, eps, c_v / sigma)
    if not variance:
        found = 2 * sigma.square() * found
    replayed = _steps.log_prob(v_old, step.x, step.x_next, step.steps, variance=variance)
    engines = replayed.to(emitted.dtype) - emitted  # 0 where it was emitted by these bits
    return found + engines.double(), c_v.square() * square


def _metrics(
    loss: Tensor, log_ratio: Tensor, kl: Tensor, far: Tensor, rising: Tensor, falling: Tensor
) -> dict[str, float]:
    """Under UniRL's names, read together."""
    ratio = log_ratio.exp()
    masked = (rising | falling).double().mean()
    found = {
        "policy_loss": loss.detach(),
        "ratio_mean": ratio.mean(),
        "ratio_std": ratio.std() if ratio.numel() > 1 else torch.zeros_like(loss),
        "ratio_min": ratio.min(),
        "ratio_max": ratio.max(),
        "approx_kl": (log_ratio.square() / 2).mean(),
        "kl_new_old_mean": kl.mean(),
        "kl_new_old_max": kl.max(),
        "kl_mask_fraction": far.double().mean(),
        "pos_rm_fraction": rising.double().mean(),
        "neg_rm_fraction": falling.double().mean(),
        "masked_fraction": masked,
        "unmasked_fraction": 1 - masked,
    }
    values = torch.stack([number.double() for number in found.values()]).tolist()
    return dict(zip(found, values, strict=True))


def _require_known_strategies(kernels: Any, denoise: Any) -> None:
    """Two samples of a dozen numbers through both: other releases have this signature and other conventions."""
    v, x = torch.randn(2, 2, 3, 4, generator=torch.Generator().manual_seed(0))
    results = {}
    for name in _STRATEGIES:
        strategy = getattr(kernels, name)()
        given = {"sigma": torch.tensor(0.75), "sigma_next": torch.tensor(0.5), "eta": 0.5, "sigma_max": 0.9}
        outputs = []
        for function in (kernels.StepStrategy.denoise, denoise):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(1)
                outputs.append(function(strategy, v, x.bfloat16(), **given))
        for field, theirs, ours in zip(("prev_sample", "log_prob", "prev_sample_mean"), *outputs, strict=True):
            results[f"{field} of {name}"] = theirs, ours
    commits = ", ".join(_DENOISE.values())
    _patching.require_agreement(f"{_KERNELS}.StepStrategy.denoise", commits, results, tolerance=1e-5)
