"""docs/recipes.md: its steps, as they stand there, teach a small model what a reward likes."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from tests.build.test_docs import blocks

GROUP, PROMPTS = 8, 16
FORWARD, REVERSE, CURRICULUM = blocks("docs/recipes.md")


class Policy(nn.Module):
    """A velocity in the plane, for a prompt that is a point."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 64), nn.SiLU(), nn.Linear(64, 2))

    def forward(self, x: Tensor, t: Tensor, prompts: Tensor) -> Tensor:
        return self.layers(torch.cat([x, t[:, None], prompts], 1))


def reward(x: Tensor, prompts: Tensor) -> Tensor:
    return -(x - prompts).square().mean(1)


@torch.no_grad()
def sample(policy: Policy, prompts: Tensor, steps: int = 10) -> Tensor:
    x = torch.randn(len(prompts), 2)
    for k in range(steps, 0, -1):
        x = x - policy(x, torch.full((len(x),), k / steps), prompts) / steps
    return x


def prompts() -> Tensor:
    return torch.randn(PROMPTS, 2).repeat_interleave(GROUP, 0)


def step_of(code: str, name: str) -> Any:
    names: dict[str, Any] = {}
    exec(code, names)
    function = code.partition(f"def {name}")[2]
    assert len(function.strip().splitlines()) <= 20
    return names[name]


def test_the_forward_step_learns() -> None:
    step, policy, rewards = step_of(FORWARD, "forward_step"), start(), []
    reference, optimizer = copy.deepcopy(policy), torch.optim.AdamW(policy.parameters(), lr=3e-3)
    for _ in range(80):
        rollout = copy.deepcopy(policy)
        found, metrics = step(policy, rollout, reference, sample, reward, prompts(), optimizer)
        rewards.append(found.mean())
    assert torch.stack(rewards[-10:]).mean() - torch.stack(rewards[:10]).mean() > 1
    assert metrics.as_dict()["reference_deviation"] > 0


def test_the_reverse_step_learns() -> None:
    step, policy, rewards = step_of(REVERSE, "reverse_step"), start(), []
    reference, optimizer = copy.deepcopy(policy), torch.optim.AdamW(policy.parameters(), lr=3e-3)
    for _ in range(40):
        x = torch.randn(PROMPTS * GROUP, 2)
        found, metrics = step(policy, reference, reward, prompts(), x, torch.linspace(1, 0, 11), optimizer)
        rewards.append(found.mean())
    assert torch.stack(rewards[-10:]).mean() - torch.stack(rewards[:10]).mean() > 0.5
    assert metrics.as_dict()["max_abs_log_ratio"] == 0  # the optimizer steps once a rollout


def test_the_step_that_chooses_its_prompts_learns() -> None:
    step, policy, means = step_of(CURRICULUM, "curriculum_step"), start(), []
    reference, optimizer = copy.deepcopy(policy), torch.optim.AdamW(policy.parameters(), lr=3e-3)
    tracker = step.__globals__["tracker"]
    for _ in range(80):
        rollout, candidates = copy.deepcopy(policy), torch.randn(80, 2)
        scores, found, metrics = step(policy, rollout, reference, sample, reward, candidates, optimizer)
        means.append(scores.mean())
        assert found.two_sided.shape == (8,) and tracker.mean.isfinite()
    assert torch.stack(means[-10:]).mean() - torch.stack(means[:10]).mean() > 1
    assert metrics.as_dict()["nonconvex_samples"] == 0


def start() -> Policy:
    torch.manual_seed(0)
    return Policy()
