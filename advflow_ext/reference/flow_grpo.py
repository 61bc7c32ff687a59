"""The Flow-GRPO loss (arXiv 2505.05470) in plain differentiable PyTorch."""

from __future__ import annotations

from torch import Tensor

from advflow_ext.contract import checks, transitions
from advflow_ext.contract.numbers import (
    ClipRange,
    Number,
    Numbers,
)
from advflow_ext.contract.outputs import LossOutput
from advflow_ext.contract.step_table import StepTable
from advflow_ext.reference._reverse import clipped_surrogate, finite_ratio, reverse_output, transitions_of

KL_CONVENTIONS = ("exact", "dt", "two_sigma_squared")


def flow_grpo_arguments(
    v: Tensor,
    v_old: Tensor,
    eps: Tensor,
    table: StepTable,
    index: int | Tensor,
    advantages: Tensor,
    clip: Number | tuple[Number, Number],
    v_ref: Tensor | None,
    kl_weight: Number,
    kl_convention: str,
    policy_weight: Number,
    time_weight: str,
    reduction: str,
) -> tuple[transitions.TransitionArguments, ClipRange]:
    """Flow-CPS and, without a KL convention of its own, GRPO-Guard take the same arguments."""
    dtype = checks.require_latents(v, v_old=v_old, eps=eps, v_ref=v_ref)
    numbers = Numbers(v, dtype)
    bounds = numbers.clip("clip", clip, most=1.0)
    checks.require_choice("kl_convention", kl_convention, KL_CONVENTIONS)
    given = transitions.transition_arguments(
        numbers, v, v_ref, table, index, advantages, kl_weight, policy_weight, time_weight, reduction, dtype
    )
    return given, bounds


def flow_grpo_scalars(given: transitions.TransitionArguments, kl_convention: str) -> transitions.TransitionScalars:
    scalars = given.scalars()
    if kl_convention == "dt":
        scalars = scalars._replace(kl_scale=scalars.kl_scale * -scalars.step.dt)
    elif kl_convention == "two_sigma_squared":
        scalars = scalars._replace(kl_scale=scalars.kl_scale * (2 * scalars.step.sigma.square()))
    return scalars


def flow_grpo_loss(
    v: Tensor,
    v_old: Tensor,
    eps: Tensor,
    table: StepTable,
    index: int | Tensor,
    advantages: Tensor,
    *,
    clip: Number | tuple[Number, Number] = 1e-4,
    v_ref: Tensor | None = None,
    kl_weight: Number = 0.0,
    kl_convention: str = "exact",
    policy_weight: Number = 1.0,
    time_weight: str = "none",
    reduction: str = "mean",
) -> LossOutput:
    """Same arguments, result and errors as :func:`advflow_ext.flow_grpo_loss`, by PyTorch autograd.

    Half precision is computed in float32, where the difference of two log-probabilities is good to about 1e-7; as soon
    as one latent is float64 everything is.
    """
    given, bounds = flow_grpo_arguments(
        v, v_old, eps, table, index, advantages, clip, v_ref, kl_weight, kl_convention, policy_weight, time_weight,
        reduction,
    )  # fmt: skip
    scalars = flow_grpo_scalars(given, kl_convention)
    at = transitions_of(scalars, v, v_old, eps, v_ref)
    log_ratio, finite = finite_ratio(at.log_ratio(), at.clean)
    policy_term, masked = clipped_surrogate(log_ratio, scalars.advantages, bounds)
    return reverse_output(at, scalars, log_ratio, policy_term, masked, finite, reduction, clip=bounds)
