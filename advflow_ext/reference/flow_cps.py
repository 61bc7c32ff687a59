"""The Flow-CPS loss (arXiv 2509.05952) in plain differentiable PyTorch."""

from __future__ import annotations

from torch import Tensor

from advflow_ext.contract.numbers import Number
from advflow_ext.contract.outputs import LossOutput
from advflow_ext.contract.step_table import StepTable
from advflow_ext.reference._forward import mean
from advflow_ext.reference._reverse import clipped_surrogate, finite_ratio, reverse_output, transitions_of
from advflow_ext.reference.flow_grpo import flow_grpo_arguments, flow_grpo_scalars


def flow_cps_loss(
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
    """Same arguments, result and errors as :func:`advflow_ext.flow_cps_loss`, by PyTorch autograd.

    Half precision is computed in float32; as soon as one latent is float64 everything is.
    """
    given, bounds = flow_grpo_arguments(
        v, v_old, eps, table, index, advantages, clip, v_ref, kl_weight, kl_convention, policy_weight, time_weight,
        reduction,
    )  # fmt: skip
    scalars = flow_grpo_scalars(given, kl_convention)
    at = transitions_of(scalars, v, v_old, eps, v_ref)
    # The log-probability of the released code: variance and constants are left out.
    log_ratio = mean(-(at.x_next - at.mu).square()) - mean(-(at.x_next - at.mu_old).square())
    log_ratio, finite = finite_ratio(log_ratio, at.clean)
    policy_term, masked = clipped_surrogate(log_ratio, scalars.advantages, bounds)
    return reverse_output(
        at,
        scalars,
        log_ratio,
        policy_term,
        masked,
        finite,
        reduction,
        steepness=2 * scalars.step.sigma.square(),
        clip=bounds,
    )
