"""The Flow-DPPO loss (arXiv 2606.11025) in plain differentiable PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from advflow_ext.contract import checks, transitions
from advflow_ext.contract.numbers import (
    Number,
    Numbers,
)
from advflow_ext.contract.outputs import LossOutput
from advflow_ext.contract.step_table import StepTable
from advflow_ext.reference._reverse import finite_ratio, reverse_output, transitions_of

DIRECTIONS = ("ratio", "log_ratio_minus_kl")


MASKS = ("current", "predictive")


def flow_dppo_arguments(
    v: Tensor,
    v_old: Tensor,
    eps: Tensor,
    table: StepTable,
    index: int | Tensor,
    advantages: Tensor,
    threshold: Number,
    direction: str,
    mask: str,
    step_size: Number | None,
    v_ref: Tensor | None,
    kl_weight: Number,
    policy_weight: Number,
    time_weight: str,
    reduction: str,
) -> tuple[transitions.TransitionArguments, Number, Number | None]:
    """What all such losses take, the threshold and the step size."""
    dtype = checks.require_latents(v, v_old=v_old, eps=eps, v_ref=v_ref)
    numbers = Numbers(v, dtype)
    limit = numbers.read("threshold", threshold, low=0.0)
    checks.require_choice("direction", direction, DIRECTIONS)
    checks.require_choice("mask", mask, MASKS)
    step = None
    if mask == "predictive":
        step = numbers.read("step_size", step_size, low=0.0, exclusive=True)
    elif step_size is not None:
        raise ValueError(f"step_size is {step_size!r}; accepted with mask 'current' is None.")
    given = transitions.transition_arguments(
        numbers, v, v_ref, table, index, advantages, kl_weight, policy_weight, time_weight, reduction, dtype
    )
    return given, limit, step


def flow_dppo_loss(
    v: Tensor,
    v_old: Tensor,
    eps: Tensor,
    table: StepTable,
    index: int | Tensor,
    advantages: Tensor,
    *,
    threshold: Number = 1e-6,
    direction: str = "ratio",
    mask: str = "current",
    step_size: Number | None = None,
    v_ref: Tensor | None = None,
    kl_weight: Number = 0.0,
    policy_weight: Number = 1.0,
    time_weight: str = "none",
    reduction: str = "mean",
) -> LossOutput:
    """Same arguments, result and errors as :func:`advflow_ext.flow_dppo_loss`, by PyTorch autograd.

    Half precision is computed in float32; as soon as one latent is float64 everything is.
    """
    given, limit, size = flow_dppo_arguments(
        v, v_old, eps, table, index, advantages, threshold, direction, mask, step_size, v_ref, kl_weight, policy_weight,
        time_weight, reduction,
    )  # fmt: skip
    scalars = given.scalars()
    at = transitions_of(scalars, v, v_old, eps, v_ref)
    A = scalars.advantages
    log_ratio, finite = finite_ratio(at.log_ratio(), at.clean)
    ratio = log_ratio.exp()

    with torch.no_grad():
        kl = at.kl(at.mu_old)
        heading = log_ratio - kl if direction == "log_ratio_minus_kl" else log_ratio
        leaving = ((A > 0) & (heading > 0)) | ((A < 0) & (heading < 0))
        if size is not None:
            ascent = (size * A * ratio)[:, None] * (at.x_next - at.mu) / at.sigma.square()
            kl = at._replace(mu=at.mu + ascent).kl(at.mu_old)
        masked = leaving & ~(kl < limit)
    policy_term = torch.where(masked, 0, -A * ratio)
    return reverse_output(at, scalars, log_ratio, policy_term, masked, finite, reduction)
