"""The GRPO-Guard loss (arXiv 2510.22319) in plain differentiable PyTorch."""

from __future__ import annotations

from torch import Tensor

from advflow_ext.contract.numbers import Number
from advflow_ext.contract.outputs import LossOutput
from advflow_ext.contract.step_table import StepTable
from advflow_ext.reference._reverse import clipped_surrogate, finite_ratio, reverse_output, transitions_of
from advflow_ext.reference.flow_grpo import flow_grpo_arguments


def grpo_guard_loss(
    v: Tensor,
    v_old: Tensor,
    eps: Tensor,
    table: StepTable,
    index: int | Tensor,
    advantages: Tensor,
    *,
    clip: Number | tuple[Number, Number] = 2e-6,
    v_ref: Tensor | None = None,
    kl_weight: Number = 0.0,
    policy_weight: Number = 1.0,
    time_weight: str = "inverse_dt",
    reduction: str = "mean",
) -> LossOutput:
    """Same arguments, result and errors as :func:`advflow_ext.grpo_guard_loss`, by PyTorch autograd.

    Half precision is computed in float32; as soon as one latent is float64 everything is.
    """
    given, bounds = flow_grpo_arguments(
        v, v_old, eps, table, index, advantages, clip, v_ref, kl_weight, "exact", policy_weight, time_weight, reduction
    )
    scalars = given.scalars()
    at = transitions_of(scalars, v, v_old, eps, v_ref)
    # RatioNorm (eq. 8): the gradient flows through the added KL too.
    log_ratio = scalars.step.sigma * (at.log_ratio() + at.kl(at.mu_old))
    log_ratio, finite = finite_ratio(log_ratio, at.clean)
    policy_term, masked = clipped_surrogate(log_ratio, scalars.advantages, bounds)
    return reverse_output(
        at, scalars, log_ratio, policy_term, masked, finite, reduction, steepness=scalars.step.sigma, clip=bounds
    )
