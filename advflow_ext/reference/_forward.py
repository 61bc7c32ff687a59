"""What the plain PyTorch forms of the forward-process losses share: flat latents behind a mask, and the output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from advflow_ext.contract.checks import Samples
from advflow_ext.contract.numbers import Number
from advflow_ext.contract.outputs import LossMetrics, LossOutput, Ratio, forward_metrics
from advflow_ext.reference._summary import gradient_fits, reduce_losses, summarise


def mean(elements: Tensor) -> Tensor:
    """``[B]`` means of ``[B, D]``; 0 for samples without elements."""
    return elements.sum(1) / max(elements.shape[1], 1)


class FlatLatents(NamedTuple):
    """Latents as ``[B, D]`` in the accumulate dtype; only ``v`` carries a gradient, and only where ``clean``."""

    v: Tensor
    x0: Tensor
    noise: Tensor
    v_old: Tensor | None
    v_ref: Tensor | None
    source: Tensor  # v as it was given
    clean: Tensor  # [B] bool: nothing given for the sample is NaN, infinite or of infinite square

    @property
    def u(self) -> Tensor:
        return self.noise - self.x0

    def deviation(self, anchor: Tensor | None) -> Tensor:
        """<(v - anchor)^2>, 0 for an absent anchor."""
        return self.v.new_zeros(self.v.shape[0]) if anchor is None else mean((self.v - anchor).square())


def flatten(
    samples: Samples, v: Tensor, x0: Tensor, noise: Tensor, v_old: Tensor | None, v_ref: Tensor | None
) -> FlatLatents:
    def flat(latent: Tensor) -> Tensor:
        return latent.flatten(1).to(samples.t.dtype)

    policy = flat(v)
    x0, noise = flat(x0.detach()), flat(noise.detach())
    v_old, v_ref = (None if anchor is None else flat(anchor.detach()) for anchor in (v_old, v_ref))
    # The mask sits at the entrance because the backward of `where` writes exact zeros there, whatever NaN arises
    # further on. Finite norms also mean that no residual below is infinite.
    with torch.no_grad():
        present = [latent for latent in (policy, noise - x0, v_old, v_ref) if latent is not None]
        norms = torch.stack([torch.linalg.vector_norm(latent, dim=1) for latent in present])
        clean = samples.finite & torch.isfinite(norms.sum(0))
    return FlatLatents(torch.where(clean[:, None], policy, 0), x0, noise, v_old, v_ref, v, clean)


def forward_output(
    latents: FlatLatents,
    samples: Samples,
    losses: Tensor,  # [B]
    reduction: str,
    *,
    policy_term: Tensor,  # [B]
    deviations: tuple[Tensor, Tensor, Tensor],  # [B] each, of v from u, v_old and v_ref
    weights: tuple[Number, Number, Number],  # what bounds the gradient's parts along those
    curvature: Tensor,  # [B]
    nonconvex: Tensor,  # [B] bool
    unbounded: str = "",
    extra: Mapping[str, Tensor] | None = None,
    ratio: Ratio | None = None,
) -> LossOutput:
    extra = extra or {}
    reported = torch.stack([losses, policy_term, curvature, *extra.values()]).detach()
    finite = latents.clean & torch.isfinite(reported).all(0) & gradient_fits(weights, deviations, latents.source)
    losses = torch.where(finite & samples.valid_t, losses, 0)
    metrics = summarise(
        [losses, policy_term, *extra.values(), *deviations],
        samples.advantages,
        curvature,
        nonconvex,
        finite,
        samples.valid_t,
        largest=False,
        contrast=deviations[1],
        ratio=ratio,
    )
    names = forward_metrics(tuple(extra), ratio is not None)
    return LossOutput(reduce_losses(losses, reduction), LossMetrics(metrics, names, unbounded))
