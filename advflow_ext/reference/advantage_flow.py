"""The three-term loss of AdvantageFlow (arXiv 2605.26013, eq. 5) in plain differentiable PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from advflow_ext.ops import _checks
from advflow_ext.ops._outputs import LossOutput, reduce_losses, summarise


def advantage_flow_loss(
    v: Tensor,
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    advantages: Tensor,
    *,
    v_old: Tensor,
    v_ref: Tensor | None = None,
    gamma: float | Tensor | str = 1.1,
    lam: float = 1e-3,
    weighting: str = "prediction",
    reduction: str = "mean",
) -> LossOutput:
    """Same arguments, result and errors as :func:`advflow_ext.advantage_flow_loss`, by PyTorch autograd.

    Half precision is computed in float32; as soon as one latent is float64 everything is.
    """
    scalars = _checks.advantage_flow_arguments(
        v, x0, noise, t, advantages, v_old, v_ref, gamma, lam, weighting, reduction
    )
    dtype = scalars.t.dtype

    def flat(latent: Tensor) -> Tensor:
        return latent.flatten(1).to(dtype)  # [B, D]

    policy = flat(v)
    target = flat(noise.detach()) - flat(x0.detach())
    anchors = [target, flat(v_old.detach())]
    if v_ref is not None:
        anchors.append(flat(v_ref.detach()))

    # The mask sits at the entrance because the backward of `where` writes exact zeros there, whatever NaN arises
    # further on. Finite norms also mean that no residual below is infinite.
    with torch.no_grad():
        norms = torch.stack([torch.linalg.vector_norm(latent, dim=1) for latent in (policy, *anchors)])
        clean = torch.isfinite(norms.sum(0) + scalars.t + scalars.curvature)
    policy = torch.where(clean[:, None], policy, 0)

    deviations = [(policy - anchor).square().sum(1) / max(policy.shape[1], 1) for anchor in anchors]
    if v_ref is None:
        deviations.append(torch.zeros_like(scalars.t))
    data, rollout, reference = deviations

    advantages, gammas = (torch.where(clean, scalar, 0) for scalar in (scalars.advantages, scalars.gamma))
    if weighting == "velocity":
        weight = torch.ones_like(scalars.t)
    elif weighting == "prediction":
        weight = scalars.t.square()
    else:
        distance = (policy.detach() - target).abs().sum(1) / max(policy.shape[1], 1)
        weight = scalars.t.square() / (scalars.t * distance).clamp(min=1e-5)

    policy_term = weight * advantages * data
    losses = policy_term + weight * (gammas * rollout + scalars.lam * reference)

    finite = clean & torch.isfinite(losses)
    usable = finite & scalars.valid_t
    losses = torch.where(usable, losses, 0)
    metrics = summarise(
        losses.detach(),
        policy_term.detach(),
        torch.stack(deviations, 1).detach(),
        scalars.advantages,
        scalars.curvature,
        scalars.nonconvex,
        finite,
        scalars.valid_t,
        usable,
    )
    return LossOutput(reduce_losses(losses, reduction), metrics)
