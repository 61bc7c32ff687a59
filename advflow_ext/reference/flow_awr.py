"""The FlowAWR loss (arXiv 2606.30376) in plain differentiable PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from advflow_ext.ops import _checks
from advflow_ext.ops._numbers import Number, per_sample
from advflow_ext.ops._outputs import LossOutput
from advflow_ext.reference._forward import flatten, forward_output


def flow_awr_loss(
    v: Tensor,
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    advantages: Tensor,
    *,
    v_old: Tensor,
    v_ref: Tensor | None = None,
    kl_weight: Number = 0.0,
    policy_weight: Number = 1.0,
    reduction: str = "mean",
) -> LossOutput:
    """Same arguments, result and errors as :func:`advflow_ext.flow_awr_loss`, by PyTorch autograd."""
    samples, kl_scale, scale = _checks.flow_awr_arguments(
        v, x0, noise, t, advantages, v_old, v_ref, kl_weight, policy_weight, reduction
    )
    latents = flatten(samples, v, x0, noise, v_old, v_ref)
    assert latents.v_old is not None

    v_target = latents.v_old + samples.advantages[:, None] * (latents.u - latents.v_old)
    policy_term = scale * latents.deviation(v_target)
    reference = latents.deviation(latents.v_ref)
    with torch.no_grad():
        data, rollout = latents.deviation(latents.u), latents.deviation(latents.v_old)
    curvature = per_sample(scale + kl_scale, samples.t)
    return forward_output(
        latents, samples, policy_term + kl_scale * reference, reduction,
        policy_term=policy_term, deviations=(data, rollout, reference),
        curvature=curvature, nonconvex=curvature <= 0,
    )  # fmt: skip
