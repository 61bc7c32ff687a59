"""What every forward-process loss ends with: per-sample coefficients turned into a loss, its gradient and metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from advflow_ext.contract.checks import Samples
from advflow_ext.contract.numbers import Number
from advflow_ext.contract.outputs import LossMetrics, LossOutput, Ratio, forward_metrics
from advflow_ext.kernels.loss import forward_loss
from advflow_ext.kernels.loss_summary import loss_summary
from advflow_ext.kernels.residual import residual_loss

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
    extra: Mapping[str, Tensor] | None = None,  # [B] each, reported as means
    ratio: Ratio | None = None,
) -> LossOutput:
    extra = extra or {}
    summary = loss_summary(
        [values, policy_term, *extra.values()],
        samples.required,
        samples.advantages,
        curvature,
        stats,
        coef,
        samples.valid_t,
        nonconvex,
        stat_means=3,  # vu, vo, vp
        largest=False,
        reduction=reduction,
        ratio=ratio,
        v=latents[0].detach(),
        contrast=True,
    )
    loss = residual_loss(*latents, summary.loss, summary.coef)
    return LossOutput(loss, LossMetrics(summary.metrics, forward_metrics(tuple(extra), ratio is not None), unbounded))


def native_output(
    name: str,
    latents: Latents,
    t: Tensor,
    advantages: Tensor,
    numbers: Sequence[Number],
    choices: Sequence[int],
    reduction: str,
    *,
    unbounded: str = "",
) -> LossOutput:
    """Of a loss whose formula the native core has itself."""
    loss, values = forward_loss(name, latents, t, advantages, numbers, choices, reduction)
    metrics = LossMetrics(values, forward_metrics(), unbounded)
    metrics.warn_now(stacklevel=4)  # the caller of the loss
    return LossOutput(loss, metrics)
