"""What float32 keeps of a log-ratio near the bound of a trust region."""

from __future__ import annotations

import math

import pytest
import torch

from advflow_ext.testing.transition_strategies import TABLES, TransitionBatch
from tests.ops.transitions import (
    closed_form,
    draw_transitions,
    native,
    select,
    value_and_grad,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")


# ---------------------------------------------------------------------------------------------------------------------
# Acceptance test 11.6: what float32 keeps of a log-ratio near a trust region's bound


def near_policy(target_kl: float, step: int, seed: int) -> TransitionBatch:
    """24 transitions of 65536 elements with that mean-reduced KL, every number exact in float32."""
    table = TABLES[0]
    generator = torch.Generator().manual_seed(seed)
    v_old, delta, eps = torch.randn(3, 24, 65536, generator=generator).unbind()
    v_old = 1.2 * v_old
    delta = delta * (math.sqrt(2 * target_kl) / abs(float(table.kappa[step])))
    advantages = 2 * torch.rand(24, generator=generator) - 1
    return TransitionBatch(
        (v_old + delta).requires_grad_(), v_old, eps, table, torch.full((24,), step), advantages, {"reduction": "none"}
    )


@pytest.mark.parametrize("target_kl", [1e-9, 1e-8, 1e-7, 1e-6, 1e-5])
@pytest.mark.parametrize("step", [1, 5, 8])
def test_log_ratio_kl_and_mask_survive_float32(target_kl, step):
    batch = near_policy(target_kl, step, seed=step)
    form = closed_form("flow_dppo", batch)
    singles = [select(batch, slice(row, row + 1)) for row in range(0, 24, 2)]
    metrics = [native("flow_dppo")(*one.arguments(), threshold=1e9).metrics.as_dict() for one in singles]
    log_ratio = torch.tensor([numbers["mean_log_ratio"] for numbers in metrics], dtype=torch.float64)
    kl = torch.tensor([numbers["mean_kl_old"] for numbers in metrics], dtype=torch.float64)
    assert (log_ratio - form.log_ratio[::2]).abs().max() <= 2e-10
    assert torch.equal(log_ratio.sign(), form.log_ratio[::2].sign())
    assert ((kl / form.kl[::2] - 1).abs() <= 1e-5).all()

    # The threshold splits the batch in two halves, and so does the sign of A log r.
    threshold = float(form.kl.median()) * (1 + 1e-4)
    masked = native("flow_dppo")(*batch.arguments(), threshold=threshold, reduction="none").loss == 0
    expected = ((batch.advantages * form.log_ratio) > 0) & (form.kl >= threshold)
    assert 2 <= expected.sum() <= 12
    assert torch.equal(masked, expected)


def test_the_published_difference_of_log_probabilities_would_fail_the_same_test():
    batch = near_policy(1e-9, 1, seed=1)
    form = closed_form("flow_dppo", batch)
    kappa = batch.table.rows(batch.index).kappa[:, None]
    eps, shifted_eps = batch.eps, batch.eps - kappa * (batch.v - batch.v_old).detach()
    constant = math.log(float(batch.table.sigma[1])) + math.log(2 * math.pi) / 2
    new, old = ((-x.square() / 2 - constant).mean(1) for x in (shifted_eps, eps))
    published = new - old
    assert (published - form.log_ratio).abs().max() > 1e-8
    assert (published.sign() != form.log_ratio.sign()).sum() >= 2


@pytest.mark.parametrize("clip", [2e-6, 1e-4])
def test_clip_is_decided_where_float32_ratios_are_too_coarse(clip):
    """Log-ratios 1 % inside and outside of either bound: the ratio 1 + 2e-6 is 17 float32 neighbours away from 1."""
    batch = draw_transitions(4, (64,), with_reference=False, clip=clip)
    batch.index.fill_(2)
    kappa = float(batch.table.kappa[2])
    delta = (batch.v.detach() - batch.v_old).double()
    bounds = [0.99 * math.log1p(clip), 1.01 * math.log1p(clip), 0.99 * math.log1p(-clip), 1.01 * math.log1p(-clip)]
    along = torch.tensor(bounds, dtype=torch.float64) / (kappa * delta.square().mean(1)) + kappa / 2
    batch.eps.copy_(along[:, None] * delta)
    batch.advantages.copy_(torch.tensor([1.0, 1, -1, -1]))
    _, grad = value_and_grad(batch, native("flow_grpo"))
    assert grad.any(1).tolist() == [True, False, True, False]
