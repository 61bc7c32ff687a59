"""The contract of flow_grpo's, DanceGRPO's and MixGRPO's steps, on stand-ins and by `make test-peers` on their code."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor

from advflow_ext.integrations import _patching
from tests.integrations import named_steps
from tests.integrations.counting import Count, as_on_a_device
from tests.integrations.named_steps import NAMED, SIGMAS, Named, Returned

every = pytest.mark.parametrize("name", NAMED)


@pytest.fixture(params=["stand-in", pytest.param("checkout", marks=pytest.mark.peers)])
def named(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, name: str) -> Iterator[Named]:
    named = NAMED[name]
    load = named_steps.load_stand_in if request.param == "stand-in" else named_steps.load_checkout
    load(monkeypatch, named)
    yield named
    named.integration.uninstall()


def both(named: Named, call: Callable[[], Returned]) -> tuple[Returned, Returned]:
    """Theirs, then ours."""
    theirs = call()
    named.integration.install()
    return theirs, call()


def assert_alike(named: Named, theirs: Returned, ours: Returned) -> None:
    """Same returns, within rounding, but for a float64 log-probability."""
    assert len(theirs.everything) == len(ours.everything)
    # What they multiply in bfloat16, the noise of MixGRPO's step as well, is rounded to 8 bits.
    off = 5e-2 if named.dtype == torch.bfloat16 else 2e-6
    for their, our in zip(theirs.everything, ours.everything, strict=True):
        assert their.shape == our.shape
        log_prob = their is theirs.log_prob
        assert our.dtype == (torch.float64 if log_prob else their.dtype)
        torch.testing.assert_close(our, their.to(our.dtype), rtol=off, atol=off)


@every
def test_a_sample_is_theirs(name, named):
    v, x = named.latents()
    assert_alike(named, *both(named, lambda: named(named.index, v, x)))


@every
def test_a_replay_is_theirs(name, named):
    v, x = named.latents()
    x_next = named(named.index, v, x).x_next
    theirs, ours = both(named, lambda: named(named.index, v, x, x_next))
    assert_alike(named, theirs, ours)
    assert torch.equal(ours.x_next, x_next)


@every
def test_an_unchanged_policy_has_log_ratio_0(name, named):
    named.integration.install()
    v, x = named.latents()
    with torch.no_grad():
        drawn = named(named.index, v, x)
    stored = torch.stack([x, drawn.x_next], 1)  # as trainers keep a trajectory, and hand out slices of it
    replayed = named(named.index, v.clone().requires_grad_(), stored[:, 0], stored[:, 1])
    assert torch.equal(replayed.log_prob, drawn.log_prob) and replayed.log_prob.requires_grad
    alone = named(named.index[2:3], v[2:3], stored[2:3, 0], stored[2:3, 1])
    assert torch.equal(alone.log_prob, drawn.log_prob[2:3])


@every
def test_log_ratio_and_gradient_are_at_least_as_exact(name, named):
    v, x = named.latents()
    with torch.no_grad():
        x_next = named(named.index, v, x).x_next
    update = 1e-3 if v.dtype == torch.bfloat16 else 1e-4  # what is not rounded away
    updated = (v.float() + update * torch.randn(v.shape)).to(v.dtype)
    (_, exact_ratio, exact_gradient), theirs = (scored(named, v, updated, x, x_next, truly) for truly in (True, False))
    named.integration.install()
    ours = scored(named, v, updated, x, x_next)
    off = [
        (float((ratio - exact_ratio).abs().max()), float((gradient - exact_gradient).norm() / exact_gradient.norm()))
        for _, ratio, gradient in (theirs, ours)
    ]
    rounding = 2e-3 if v.dtype == torch.bfloat16 else 4e-7  # of a gradient stored as v is
    assert off[1][0] <= min(off[0][0], 1e-8) and off[1][1] <= max(1.2 * off[0][1], rounding), off
    exact = named.truth(updated.double(), x, x_next)[1]
    assert (ours[0] - exact).abs().max() <= max(float((theirs[0] - exact).abs().max()), 1e-7)


def scored(
    named: Named, v: Tensor, updated: Tensor, x: Tensor, x_next: Tensor, truly: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The log-probability of the updated policy, its log-ratio, and the gradient of a weighted sum, all in float64."""
    leaf = (updated.double() if truly else updated).clone().requires_grad_()
    if truly:
        old, new = named.truth(v.double(), x, x_next)[1], named.truth(leaf, x, x_next)[1]
    else:
        old, new = named(named.index, v, x, x_next).log_prob, named(named.index, leaf, x, x_next).log_prob
    (new * torch.tensor([1.0, -1.0, 0.5, -2.0])).sum().backward()
    assert leaf.grad is not None
    return new.detach().double(), (new - old).detach().double(), leaf.grad.double()


@every
def test_what_else_is_returned_has_its_gradient(name, named):
    v, x = named.latents()
    v = v.float()
    gradients: list[list[Tensor]] = []

    def of_both(x_next: Tensor | None) -> list[Tensor]:
        leaves = v.clone().requires_grad_(), x.clone().requires_grad_()
        returned = [each for each in named(named.index, *leaves, x_next).everything if each.requires_grad]
        weighed = sum((each.double() * torch.linspace(1, 2, each.numel()).view(each.shape)).sum() for each in returned)
        # Of a log-probability ours goes to the velocity alone.
        to_x = sum(each.square().sum() for each in returned if each.dim() > 1)
        return [*torch.autograd.grad(weighed, leaves[:1], retain_graph=True), *torch.autograd.grad(to_x, leaves[1:])]

    for installed in (False, True):
        if installed:
            named.integration.install()
        gradients.append(of_both(None) + of_both(x + 0.1))
    for theirs, ours in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)


@every
def test_nothing_waits_and_less_is_launched(name, named, monkeypatch):
    v, x = named.latents()
    theirs = counted(named, v, x)
    named.integration.install()
    as_on_a_device(monkeypatch)
    ours = counted(named, v, x)
    assert theirs.reads > 0 == ours.reads and 3 * ours.large <= theirs.large, (theirs, ours)


def counted(named: Named, v: Tensor, x: Tensor) -> Count:
    with Count(x.numel()) as count:
        drawn = named(named.index, v, x)
        leaf = v.clone().requires_grad_()
        torch.autograd.grad(named(named.index, leaf, x, drawn.x_next).log_prob.sum(), leaf)
    return count


@pytest.mark.parametrize("name", [name for name in NAMED if not name.startswith("DanceGRPO")])
def test_noise_level_0_is_an_euler_step(name, named):
    v, x = named.latents()
    named.integration.install()
    drawn = named(named.index, v, x, level=0.0)
    dt = (SIGMAS[named.index + 1] - SIGMAS[named.index]).view(-1, *[1] * (x.dim() - 1))
    torch.testing.assert_close(drawn.x_next, x + dt * v.float(), rtol=2e-6, atol=2e-6)
    assert torch.equal(drawn.log_prob, torch.zeros(4).double())


@every
def test_it_is_put_back_everywhere(name, named, monkeypatch):
    module, theirs = sys.modules[named.module], named.function()
    signature = _patching.signature_of(theirs)
    pipeline = ModuleType("a_pipeline")
    pipeline.step = theirs
    monkeypatch.setitem(sys.modules, "a_pipeline", pipeline)
    before = {key: id(value) for key, value in vars(module).items()}
    named.integration.install()
    ours = named.function()
    assert ours is pipeline.step is not theirs and _patching.signature_of(ours) == signature
    pipeline.late = ours
    named.integration.install()
    assert named.function() is ours
    named.integration.uninstall()
    assert named.function() is theirs is pipeline.step is pipeline.late
    assert {key: id(value) for key, value in vars(module).items()} == before
    named.integration.uninstall()


@every
def test_another_signature_is_refused(name, named):
    def changed(self, velocity, sample, *, level=0.7): ...

    known = _patching.signature_of(named.function())
    module = sys.modules[named.module]
    changed = type(changed)(changed.__code__, vars(module), named.name)  # defined there
    setattr(module, named.name, changed)
    with pytest.raises(RuntimeError) as error:
        named.integration.install()
    assert str(error.value).startswith(
        f"{named.module}.{named.name} is (self, velocity, sample, *, level); accepted is ("
    )
    assert known in str(error.value)
    assert named.function() is changed


@every
def test_the_same_signature_with_other_numbers_is_refused(name, named):
    module = sys.modules[named.module]
    module.kept = named.function()
    passed = ", ".join(f"{each}={each}" for each in inspect.signature(module.kept).parameters)
    body = f"first, *others = kept({passed}); return 1.001 * first, *others"
    exec(f"def {named.name}{_patching.signature_of(module.kept)}: {body}", vars(module))
    changed = named.function()
    with pytest.raises(
        RuntimeError, match=f"{named.name} computes another prev_sample than that of .* by 0.001 of its"
    ):
        named.integration.install()
    assert named.function() is changed


@every
def test_exact_says_where_it_is(name, named):
    with pytest.raises(
        ValueError, match=r"^exact is True; accepted is False: .* carr(y|ies) neither the rollout's velocity"
    ):
        named.integration.install(exact=True)
