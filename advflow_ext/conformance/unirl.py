"""Tencent-Hunyuan/UniRL: Flow-DPPO, now and before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import advflow_ext as af
from advflow_ext.conformance.rollout import (
    Density,
    Rollout,
    Step,
    kept,
    log_prob,
    log_prob_without_variance,
    shifted_once,
)
from advflow_ext.conformance.rows import (
    STEPS,
    Inputs,
    Row,
    advantage_row,
    mean,
)


def flow_dppo_loss(
    step: Step, v: Tensor, v_ref: Tensor | None, x_next: Tensor, log_prob_old: Tensor, mean_old: Tensor,
    advantages: Tensor, threshold: float, kl_weight: float, density: Density = log_prob,
) -> Tensor:  # fmt: skip
    """With its later fixes: means in fp32, the sampler's sigma."""
    mu, std = step(v)
    log_ratio = density(x_next, (mu, std)) - log_prob_old
    kl = mean((mu - mean_old) ** 2 / (2 * std**2))
    losses = torch.where(kept(advantages, log_ratio, kl, threshold), -advantages * log_ratio.exp(), 0)
    if v_ref is not None:
        with torch.no_grad():
            mu_ref = step(v_ref)[0]
        losses = losses + kl_weight * mean((mu - mu_ref) ** 2 / (2 * std**2))
    return losses.mean()


def unirl_flow_dppo(inputs: Inputs) -> Iterator[Row]:
    """algorithms/flowdppo.py and base.py, sde/kernels.py: the sampler's own sigma in its KLs."""
    name, sigmas, A = "UniRL Flow-DPPO", shifted_once(10), inputs.A
    at = Rollout(name, inputs, "flow_sde", 0.7, sigmas, STEPS % 9)

    def kl(at: Rollout, v: Tensor, anchor: Tensor) -> Tensor:
        return at.squared_drift(v, anchor) / (2 * at.std**2)

    def loss(v: Tensor, density: Density = log_prob, at: Rollout = at) -> Tensor:
        return flow_dppo_loss(
            at.step, v, inputs.v_ref, at.x_next, at.log_prob_old(density), at.mean_old, A,
            threshold=1e-6, kl_weight=0.01, density=density,
        )  # fmt: skip

    options: dict[str, Any] = {"threshold": 1e-6, "v_ref": inputs.v_ref, "kl_weight": 0.01}
    yield at.sigma_at_one("sigma at s = 1, sampler and KL", at.std[:1])
    yield at.stored_log_prob()
    yield at.kl_old(kl(at, inputs.v, inputs.v_old))
    yield at.masked(~kept(A, at.log_ratio(inputs.v), kl(at, inputs.v, inputs.v_old), 1e-6), threshold=1e-6)
    yield at.kl_ref(af.flow_dppo_loss, kl(at, inputs.v, inputs.v_ref))
    yield at.loss(af.flow_dppo_loss, loss, **options)
    other = Rollout(name, inputs, "cps", 0.8, sigmas, STEPS % 9)
    yield other.kl_old(kl(other, inputs.v, inputs.v_old), quantity="KL to the rollout policy, CPS")
    yield other.loss(
        af.flow_dppo_loss, partial(loss, density=log_prob_without_variance, at=other),
        "its log-probabilities of CPS lack 1 / (2 sigma^2)", quantity="loss, CPS", **options,
    )  # fmt: skip


def earlier_unirl_flow_dppo(inputs: Inputs) -> Iterator[Row]:
    """algorithms/flowdppo.py, sde/, types/rollout_resp.py of June 2026."""
    name, sigmas = "UniRL Flow-DPPO, earlier", shifted_once(10)
    at = Rollout(name, inputs, "flow_sde", 0.7, sigmas, STEPS % 9)
    kl_table = Rollout(name, inputs, "flow_sde", 0.7, sigmas, STEPS % 9, convention="clamp_0.99")

    def kl(at: Rollout, v: Tensor) -> Tensor:
        """With a sigma rebuilt from the schedule, whatever the sampler took."""
        std_dev_t = 0.7 * (at.s / (1 - at.s.clamp(max=0.99))).sqrt()
        sigma = std_dev_t.flatten() * at.h.sqrt()
        return at.squared_drift(v, inputs.v_old) / (2 * sigma**2)

    def loss(at: Rollout, threshold: float) -> Callable[[Tensor], Tensor]:
        def of(v: Tensor) -> Tensor:
            log_ratio = at.log_ratio(v)
            keep = kept(inputs.A, log_ratio, kl(at, v), threshold)
            return torch.where(keep, -inputs.A * log_ratio.exp(), 0).mean()

        return of

    yield at.kl_of_a_change(8, "shift 3 once")
    yield at.next_x()
    yield at.log_prob()
    yield at.sigma_at_one("sigma at s = 1, sampler", at.std[:1])
    yield kl_table.sigma_at_one("sigma at s = 1, KL", 0.7 * (torch.tensor(1 / 0.01).double() * at.h[:1]).sqrt())
    yield at.kl_old(
        kl(at, inputs.v), "its KL clamps s at 0.99, its sampler does not; convention='clamp_0.99' gives the KL"
    )
    yield kl_table.kl_old(kl(at, inputs.v))

    later = Rollout(name, inputs, "flow_sde", 0.7, sigmas, 1 + STEPS % 4)
    keep = kept(inputs.A, later.log_ratio(inputs.v), kl(later, inputs.v), 1e-6)
    yield later.masked(~keep, threshold=1e-6)
    yield later.loss(af.flow_dppo_loss, loss(later, 1e-6), quantity="loss, s below 1", threshold=1e-6)
    first = Rollout(name, inputs, "flow_sde", 0.7, sigmas, 0 * STEPS)
    yield first.loss(  # threshold times (1 - sigmas[1]) / (1 - 0.99)
        af.flow_dppo_loss, loss(first, 1e-7), quantity="loss at s = 1 for its threshold=1e-07", threshold=3.5714e-7
    )
    other = Rollout(name, inputs, "cps", 0.8, sigmas, STEPS % 9)
    yield other.kl_of_a_change(8, "shift 3 once, CPS")
    yield other.kl_old(
        kl(other, inputs.v), "its KL takes Flow-SDE's sigma under every sampler; no option gives it",
        quantity="KL to the rollout policy, CPS",
    )  # fmt: skip

    over_all = inputs.centred / (inputs.rewards.std() + 1e-8)
    yield advantage_row(
        name, inputs, over_all, quantity="advantages, use_global_std on",
        norm="raw_global_std", clip=None, eps=1e-8, ddof=1,
    )  # fmt: skip
    over_group = inputs.centred / (inputs.rewards.var(1, correction=0, keepdim=True) + 1e-8).sqrt()
    yield advantage_row(
        name, inputs, over_group, "its eps is inside the root; eps=0.0 is within 1e-8 / (2 variance) of it",
        quantity="advantages, use_global_std off", norm="group_std", clip=None, eps=0.0,
    )  # fmt: skip
