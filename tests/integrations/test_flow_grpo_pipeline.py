"""flow_grpo's own pipeline and replay on the embedded world, before and after install(), by `make test-peers`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from advflow_ext.integrations import flow_grpo
from tests.integrations import embedded_flow_grpo as embedded
from tests.integrations.counting import Count, as_on_a_device
from tests.integrations.embedded_flow_grpo import World

pytestmark = pytest.mark.peers
J = 4  # of ten steps


@pytest.fixture(scope="module")
def worlds() -> Iterator[tuple[World, World]]:
    """Theirs, and ours with the function installed; each with its own rollout."""
    checkout = Path(os.environ["PEERS"]) / "flow_grpo"
    if not checkout.is_dir():
        pytest.skip(f"there is no flow_grpo in {checkout.parent}")
    pytest.importorskip("diffusers")
    with pytest.MonkeyPatch.context() as monkeypatch, embedded.trainer(monkeypatch, checkout) as parts:
        theirs = World(*parts)
        flow_grpo.install()
        yield theirs, World(*parts)


def updated(world: World) -> tuple[Tensor, Tensor, Tensor]:
    """Velocities of an updated policy, of that of the rollout, and of a reference."""
    old = world.velocities(J)
    generator = torch.Generator().manual_seed(1)
    return (*(old + size * torch.randn(old.shape, generator=generator) for size in (1e-4, 0, 1e-2)),)


def test_the_rollout_is_theirs_within_rounding(worlds):
    theirs, ours = (world.sample for world in worlds)
    assert ours["log_probs"].dtype == torch.float64
    torch.testing.assert_close(ours["latents"], theirs["latents"], rtol=0, atol=2e-4)  # after ten steps of a network
    torch.testing.assert_close(ours["log_probs"][:, :9].float(), theirs["log_probs"][:, :9], rtol=0, atol=2e-4)


def test_before_an_update_the_log_ratio_is_0(worlds):
    _, ours = worlds
    for j in range(embedded.STEPS):
        log_prob = ours.replay(ours.pipeline.transformer, j)[1]
        assert torch.equal(log_prob, ours.sample["log_probs"][:, j])


def test_loss_and_gradient_are_those_of_float64(worlds):
    _, ours = worlds
    v, v_old, v_ref = updated(ours)
    step, truth = ours.step(J, v, v_ref), ours.truth(J, v, v_old, v_ref)
    # Of the half with the prompt: at ac4c86e its replay detaches the other one.
    found, wanted = (each.gradient.double().chunk(2)[1] for each in (step, truth))
    assert float((found - wanted).norm() / wanted.norm()) <= 4e-7
    assert float((step.log_ratio - truth.log_ratio).abs().max()) <= 2e-8  # their guidance is float32
    torch.testing.assert_close(step.loss, truth.loss, rtol=1e-6, atol=1e-8)


def test_a_step_of_training_waits_for_nothing(worlds, monkeypatch):
    _, world = worlds
    v, _, v_ref = updated(world)
    as_on_a_device(monkeypatch)
    ours = counted(world, v, v_ref)
    flow_grpo.uninstall()
    theirs = counted(world, v, v_ref)
    flow_grpo.install()
    assert (theirs.reads, ours.reads) == (34, 0) and theirs.large >= 4 * ours.large, (theirs, ours)


def counted(world: World, v: Tensor, v_ref: Tensor) -> Count:
    """A policy's replay with its gradient and a reference's, without guidance."""
    leaf, reference = v.chunk(2)[1].clone().requires_grad_(), v_ref.chunk(2)[1]
    world.config.train.cfg = False
    with Count(leaf.numel()) as count:
        torch.autograd.grad(world.replay(lambda **_: (leaf,), J)[1].sum(), leaf)
        with torch.no_grad():
            world.replay(lambda **_: (reference,), J)
    world.config.train.cfg = True
    return count
