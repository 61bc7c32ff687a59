"""The paper of Flow-DPPO."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import advflow_ext as af
from advflow_ext.conformance.rollout import (
    Rollout,
    kept,
    shifted_once,
)
from advflow_ext.conformance.rows import (
    STEPS,
    Inputs,
    Row,
    mean,
)


def flow_dppo_paper(inputs: Inputs) -> Iterator[Row]:
    """arXiv 2606.11025, and the refinements of its appendix E."""
    at = Rollout("Flow-DPPO paper", inputs, "flow_sde", 0.8, shifted_once(10), STEPS % 9)
    sigma, A = at.std, inputs.A
    mu, mu_old = at.step(inputs.v)[0], at.step(inputs.v_old)[0]
    log_ratio, kl = at.log_ratio(inputs.v), at.squared_drift(inputs.v, inputs.v_old) / (2 * sigma**2)

    def loss(v: Tensor) -> Tensor:
        keep = kept(A, at.log_ratio(v), at.squared_drift(v, inputs.v_old) / (2 * sigma**2), 1e-6)
        kl_ref = at.squared_drift(v, inputs.v_ref) / (2 * sigma**2)
        return (torch.where(keep, -A * at.log_ratio(v).exp(), 0) + 1e-3 * kl_ref).mean()

    yield at.kl_old(kl, quantity="KL to the rollout policy, eq. 15")
    yield at.row("KL of two means, eq. 20", "gaussian_kl(mean, mean_old, sigma)", af.gaussian_kl(mu, mu_old, sigma), kl)
    yield at.masked(~kept(A, log_ratio, kl, 1e-6), threshold=1e-6)
    yield at.loss(af.flow_dppo_loss, loss, threshold=1e-6, v_ref=inputs.v_ref, kl_weight=1e-3)

    away = (A * (log_ratio - kl) > 0) & (kl >= 1e-6)
    yield at.masked(
        away, quantity="masked transitions, App. E direction", threshold=1e-6, direction="log_ratio_minus_kl"
    )
    size = 2e-3
    stepped = mu + (size * A * log_ratio.exp() / sigma**2).view_as(at.s) * (at.x_next - mu)
    kl_after = mean((stepped - mu_old) ** 2) / (2 * sigma**2)
    yield at.masked(
        ~kept(A, log_ratio, kl_after, 1e-6), quantity="masked transitions, App. E prediction",
        threshold=1e-6, mask="predictive", step_size=size,
    )  # fmt: skip
