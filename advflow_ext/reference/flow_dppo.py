"""The Flow-DPPO loss (arXiv 2606.11025) in plain differentiable PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from advflow_ext.ops._numbers import Number
from advflow_ext.ops._outputs import LossOutput
from advflow_ext.ops._transition_checks import flow_dppo_arguments
from advflow_ext.ops.step_table import StepTable
from advflow_ext.reference._reverse import finite_ratio, reverse_output, transitions


def flow_dppo_loss(
    v: Tensor,
    v_old: Tensor,
    eps: Tensor,
    table: StepTable,
    index: Tensor,
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
    scalars, limit, size = flow_dppo_arguments(
        v, v_old, eps, table, index, advantages, threshold, direction, mask, step_size, v_ref, kl_weight, policy_weight,
        time_weight, reduction,
    )  # fmt: skip
    at = transitions(scalars, v, v_old, eps, v_ref)
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
