"""The self-check of a policy that is run in two ways."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import advflow_ext as af

pytest.importorskip("peft", reason="the trainer's dependencies are not installed")


from tests.nn.lora_models import inputs, with_adapters
from tests.policies.roles import PLENTY, ROLES, run


def test_a_policy_differs_from_itself_only_by_how_it_is_run() -> None:
    model = with_adapters("one", "two", dtype=torch.bfloat16, adapter_dtype=torch.bfloat16, size=0.1)
    policies = af.PolicySet(model, ROLES, merged_bytes=PLENTY)
    table = af.StepTable([1.0, 0.7, 0.3, 0.0], stochastic_steps=[0, 1])
    x, tokens, pooled, t = inputs(torch.bfloat16, batch=6)
    grads: list[bool] = []

    def velocity(*rows: Tensor) -> Tensor:
        grads.append(torch.is_grad_enabled())
        out: Tensor = model(*rows, return_dict=False)[0]
        return out

    def check(**changes: Any) -> af.Mismatch:
        settings = {"rollout_batch": 6, "train_batch": 6, "table": table, "index": torch.tensor([0, 1] * 3)} | changes
        return policies.mismatch("rollout", velocity, (x, tokens, pooled, t), **settings)

    assert check() == (0.0, 0.0)
    assert grads == [False, True]
    merged = check(merged=True, train_batch=4)
    assert merged.velocity > 0 and merged.log_ratio > 0 and not policies.merged
    # By hand: the log-ratio of one sample, from two densities.
    with policies.use("rollout", merged=True):
        v_old = run(model, (x, tokens, pooled, t)).double()
    with policies.use("rollout", merged=False):
        v = run(model, (x, tokens, pooled, t)).double()
    eps = torch.randn(x.shape, generator=torch.Generator().manual_seed(5)).double()
    found = check(merged=True, eps=eps)
    rows = table.rows(torch.tensor([0, 1] * 3), torch.float64)
    kappa_delta = rows.kappa.view(-1, 1, 1, 1) * (v - v_old)
    by_hand = torch.distributions.Normal(0.0, 1.0)
    log_ratio = (by_hand.log_prob(eps - kappa_delta) - by_hand.log_prob(eps)).flatten(1).mean(1)
    assert found.log_ratio == pytest.approx(log_ratio.abs().max().item(), rel=1e-4)
    assert found.velocity == pytest.approx((v - v_old).abs().max().item())
    with pytest.raises(ValueError, match=r"index has shape \[1\] and the steps \[2\]; accepted are 6 of the"):
        check(index=torch.tensor([2]))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"merged_bytes": float("nan")}, "merged_bytes is nan; accepted is 0 or more"),
        ({"merged_bytes": True}, "merged_bytes is True; accepted is 0 or more"),
        ({"merged_bytes": float("inf")}, "merged_bytes is inf; accepted is 0 or more"),
        ({"adapters": ["one"]}, "adapters is a list; accepted is at least one policy"),
    ],
)
def test_more_wrong_arguments_are_said(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        af.PolicySet(with_adapters("one"), **({"adapters": {"learner": "one"}} | changes))
