"""The three-term loss of AdvantageFlow (arXiv 2605.26013, eq. 5) in plain differentiable PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from advflow_ext.ops import _checks
from advflow_ext.ops._numbers import Number
from advflow_ext.ops._outputs import LossOutput
from advflow_ext.reference._forward import flatten, forward_output, mean


def advantage_flow_loss(
    v: Tensor,
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    advantages: Tensor,
    *,
    v_old: Tensor,
    v_ref: Tensor | None = None,
    gamma: Number | str = 1.1,
    lam: Number = 1e-3,
    beta: Number = 1.0,
    weighting: str = "prediction",
    reduction: str = "mean",
) -> LossOutput:
    """Same arguments, result and errors as :func:`advflow_ext.advantage_flow_loss`, by PyTorch autograd.

    Half precision is computed in float32; as soon as one latent is float64 everything is.
    """
    samples, quadratic = _checks.advantage_flow_arguments(
        v, x0, noise, t, advantages, v_old, v_ref, gamma, lam, beta, weighting, reduction
    )
    latents = flatten(samples, v, x0, noise, v_old, v_ref)
    data, rollout, reference = (latents.deviation(anchor) for anchor in (latents.u, latents.v_old, latents.v_ref))

    if weighting == "velocity":
        m = torch.ones_like(samples.t)
    elif weighting == "prediction":
        m = samples.t.square()
    else:
        distance = mean((latents.v.detach() - latents.u).abs())
        m = samples.t.square() / (samples.t * distance).clamp(min=1e-5)

    beta_A, gammas, lams = quadratic.weights.unbind(1)
    policy_term = m * beta_A * data
    losses = policy_term + m * (gammas * rollout + lams * reference)
    return forward_output(
        latents, samples, losses, reduction,
        policy_term=policy_term, deviations=(data, rollout, reference), weights=(m * beta_A, m * gammas, m * lams),
        curvature=quadratic.curvature, nonconvex=quadratic.nonconvex, unbounded=quadratic.unbounded,
    )  # fmt: skip
