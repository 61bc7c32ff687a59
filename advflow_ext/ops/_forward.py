"""What every forward-process loss ends with: per-sample coefficients turned into a loss, its gradient and metrics."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from advflow_ext.ops._checks import Samples
from advflow_ext.ops._outputs import LossOutput, reduce_losses, summarise
from advflow_ext.ops.residual import residual_loss

Latents = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]  # v, x0, noise, v_old, v_ref


def forward_output(
    latents: Latents,
    stats: Tensor,  # [B, 8], of residual_stats
    samples: Samples,
    values: Tensor,  # [B]
    coef: Tensor,  # [B, 3]: a, b, c of the gradient
    reduction: str,
    *,
    policy_term: Tensor,  # [B]
    curvature: Tensor,  # [B]
    nonconvex: Tensor,  # [B] bool
    unbounded: str = "",
    extra: Mapping[str, Tensor] | None = None,
) -> LossOutput:
    # One non-finite latent makes a statistic non-finite, also where its weight is zero.
    finite = samples.finite & torch.isfinite(values + stats.sum(1) + coef.sum(1))
    losses = residual_loss(*latents, values, coef, finite & samples.valid_t)
    metrics = summarise(
        values,
        policy_term,
        stats[:, :3],
        samples.advantages,
        curvature,
        nonconvex,
        finite,
        samples.valid_t,
        unbounded=unbounded,
        extra=extra,
    )
    return LossOutput(reduce_losses(losses, reduction), metrics)
