"""The three-term loss of AdvantageFlow (arXiv 2605.26013, eq. 5) in plain differentiable PyTorch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from advflow_ext.contract import checks
from advflow_ext.contract.batches import any_batch
from advflow_ext.contract.numbers import (
    Number,
    Numbers,
    is_number,
    per_sample,
)
from advflow_ext.contract.outputs import LossOutput
from advflow_ext.reference._forward import flatten, forward_output, mean

GAMMA_FORMS = ("1-A", "beta(beta-A)")


class AdvantageFlowNumbers(NamedTuple):
    gamma: Number | str
    lam: Number
    beta: Number

    @property
    def unbounded(self) -> str:
        """What to say of samples whose loss has no minimum."""
        data = "A" if isinstance(self.beta, float) and self.beta == 1 else "beta A"
        return (
            f"{{count}} sample(s) have {data} + gamma + lam <= 0 (smallest {{lowest:.6g}}): their loss is unbounded "
            "below and pushes the policy away without limit. Use gamma above the largest |beta A| (1.1 for advantages "
            'clipped to [-1, 1] and beta = 1), gamma="1-A" or gamma="beta(beta-A)". Said once; '
            "metrics.nonconvex_samples keeps counting."
        )


def advantage_flow_arguments(
    v: Tensor,
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    advantages: Tensor,
    v_old: Tensor,
    v_ref: Tensor | None,
    gamma: Number | str,
    lam: Number,
    beta: Number,
    weighting: str,
    reduction: str,
) -> tuple[torch.dtype, Numbers, AdvantageFlowNumbers]:
    dtype = checks.require_samples(
        v, t, "advantages", advantages, reduction, x0=x0, noise=noise, v_old=v_old, v_ref=v_ref
    )
    numbers = Numbers(v, dtype)
    scale = numbers.read("beta", beta, low=0.0, exclusive=True)
    lams = numbers.weight_of("lam", lam, "v_ref", v_ref, default=1e-3)
    checks.require_choice("weighting", weighting, checks.WEIGHTINGS)
    accepted = 'number, a [B] tensor, a 0-dim tensor, "1-A" and "beta(beta-A)"'
    if isinstance(gamma, str):
        if gamma not in GAMMA_FORMS:
            raise ValueError(f"gamma is {gamma!r}; accepted are a {accepted}.")
        return dtype, numbers, AdvantageFlowNumbers(gamma, lams, scale)
    if not isinstance(gamma, Tensor) and not is_number(gamma, dtype):
        raise ValueError(f"gamma is {gamma!r}; accepted are a finite {accepted}.")
    return dtype, numbers, AdvantageFlowNumbers(numbers.read("gamma", gamma), lams, scale)


@any_batch
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
    dtype, numbers, given = advantage_flow_arguments(
        v, x0, noise, t, advantages, v_old, v_ref, gamma, lam, beta, weighting, reduction
    )
    samples = checks.samples_in(dtype, t, advantages)
    A = samples.advantages
    beta_A, lams = given.beta * A, per_sample(given.lam, A)
    if isinstance(given.gamma, str):
        gammas = 1 - A if given.gamma == "1-A" else given.beta * (given.beta - A)
    else:
        gammas = per_sample(given.gamma, A)
    curvature = beta_A + gammas + lams
    nonconvex = curvature <= 0
    checks.warn_on_cpu(given.unbounded, curvature, nonconvex)
    samples = samples.usable_with(numbers, curvature)
    latents = flatten(samples, v, x0, noise, v_old, v_ref)
    data, rollout, reference = (latents.deviation(anchor) for anchor in (latents.u, latents.v_old, latents.v_ref))

    if weighting == "velocity":
        m = torch.ones_like(samples.t)
    elif weighting == "prediction":
        m = samples.t.square()
    else:
        distance = mean((latents.v.detach() - latents.u).abs())
        m = samples.t.square() / (samples.t * distance).clamp(min=1e-5)

    policy_term = m * beta_A * data
    losses = policy_term + m * (gammas * rollout + lams * reference)
    return forward_output(
        latents, samples, losses, reduction,
        policy_term=policy_term, deviations=(data, rollout, reference), weights=(m * beta_A, m * gammas, m * lams),
        curvature=curvature, nonconvex=nonconvex, unbounded=given.unbounded,
    )  # fmt: skip
