"""The contract of every step that is replaced by name, on stand-ins; in `make test-peers` on the real trainers."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from advflow_ext.integrations import _patching
from tests.integrations.counting import Count, as_on_a_device
from tests.integrations.stand_ins.gaussians import log_density, transition
from tests.integrations.steps_of_trainers import LEVELS, SIGMAS, TRAINERS, Drawn, Trainer

pytestmark = pytest.mark.filterwarnings("ignore:UniRL casts log-probabilities")
INDEX = torch.tensor([0, 1, 3, 8])
SAMPLERS = list(LEVELS)


@pytest.fixture(params=["stand-in", "real"])
def trainer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, name: str) -> Iterator[Trainer]:
    trainer = TRAINERS[name]
    trainer.load(monkeypatch, request.param)
    yield trainer
    trainer.integration.uninstall()


def latents(dtype: torch.dtype = torch.float32, size: tuple[int, ...] = (4, 16, 16)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    v, x = (torch.randn(len(INDEX), *size, generator=generator).to(dtype) for _ in range(2))
    return v, x


def truth(sampler: str, v: Tensor, x: Tensor, x_next: Tensor) -> Tensor:
    """The log-probability in float64, with its gradient."""
    shape = (-1, *[1] * (x.dim() - 1))
    s, s_end = (SIGMAS.double()[places].view(shape) for places in (INDEX, INDEX + 1))
    level = torch.tensor(LEVELS[sampler], dtype=torch.float64)
    mean, _, sigma = transition(sampler, v.double(), x.double(), s, s_end, level, SIGMAS.double()[1])
    return log_density(x_next.double(), mean, sigma, variance=sampler != "cps")


@pytest.mark.parametrize("name", TRAINERS)
def test_what_is_returned(name, trainer):
    cases = [(sampler, dtype) for sampler in SAMPLERS for dtype in trainer.dtypes]
    theirs = [stepped(trainer, *case) for case in cases]
    trainer.integration.install()
    for case, (drawn, again) in zip(cases, theirs, strict=True):
        ours = stepped(trainer, *case, stored=drawn.x_next)
        assert ours[0].log_prob.dtype == torch.float64  # the one difference that is meant
        for expected, found in zip((drawn, again), ours, strict=True):
            rounding = {"rtol": 2**-8, "atol": 1e-5} if case[1] == torch.bfloat16 else {"rtol": 1e-6, "atol": 1e-6}
            torch.testing.assert_close(found.x_next, expected.x_next, **rounding)
            torch.testing.assert_close(found.mean, expected.mean, rtol=1e-6, atol=1e-6)
            assert found.log_prob.shape == expected.log_prob.shape
        torch.testing.assert_close(ours[1].log_prob.float(), again.log_prob, rtol=2e-6, atol=1e-6)
        assert torch.equal(ours[1].x_next, again.x_next)


def stepped(trainer: Trainer, sampler: str, dtype: torch.dtype, stored: Tensor | None = None) -> tuple[Drawn, Drawn]:
    """A step that is drawn, and the replay of a stored one."""
    v, x = latents(dtype)
    drawn = trainer.step(sampler, INDEX, v, x)
    return drawn, trainer.step(sampler, INDEX, v, x, drawn.x_next if stored is None else stored)


@pytest.mark.parametrize("name", TRAINERS)
def test_an_unchanged_policy_has_log_ratio_0(name, trainer):
    trainer.integration.install()
    for sampler in SAMPLERS:
        for dtype in trainer.dtypes:
            v, x = latents(dtype)
            with torch.no_grad():
                drawn = trainer.step(sampler, INDEX, v, x)
            # As trainers replay: a stored latent, a slice of a batch, and other samples beside it.
            batch = torch.stack([x, drawn.x_next.to(dtype)], 1)
            replayed = trainer.step(sampler, INDEX, v.requires_grad_(), batch[:, 0], batch[:, 1])
            assert torch.equal(replayed.log_prob, drawn.log_prob) and replayed.log_prob.requires_grad
            pair = trainer.step(sampler, INDEX[1:3], v[1:3], batch[1:3, 0], batch[1:3, 1])
            assert torch.equal(pair.log_prob, drawn.log_prob[1:3])


@pytest.mark.parametrize("name", TRAINERS)
def test_log_prob_and_gradient_are_at_least_as_near_to_float64(name, trainer):
    theirs = {sampler: errors(trainer, sampler) for sampler in SAMPLERS}
    trainer.integration.install()
    for sampler in SAMPLERS:
        (gradient, log_ratio), (theirs_gradient, theirs_log_ratio) = errors(trainer, sampler), theirs[sampler]
        assert gradient <= max(theirs_gradient, 4e-7) and log_ratio <= min(theirs_log_ratio, 1e-8), sampler


def errors(trainer: Trainer, sampler: str) -> tuple[float, float]:
    """Of the gradient, relative, and of the log-ratio after a small update, absolute."""
    v, x = latents(size=(16, 32, 32))
    x_next = trainer.step(sampler, INDEX, v, x).x_next
    updated = v + 1e-4 * torch.randn(v.shape, generator=torch.Generator().manual_seed(1))
    A = torch.tensor([1.0, -1.0, 0.5, -2.0])

    def scored(velocity: Tensor, exactly: bool) -> tuple[Tensor, Tensor]:
        leaf = velocity.clone().requires_grad_()
        if exactly:
            log_prob = truth(sampler, leaf, x, x_next)
        else:
            log_prob = trainer.step(sampler, INDEX, leaf, x, x_next).log_prob
        (grad,) = torch.autograd.grad((log_prob * A).sum(), leaf)
        return log_prob.detach().double(), grad.double()

    (new, grad), (exact_new, exact_grad) = scored(updated, False), scored(updated, True)
    (old, _), (exact_old, _) = scored(v, False), scored(v, True)
    change = (new - old) - (exact_new - exact_old)
    return float((grad - exact_grad).norm() / exact_grad.norm()), float(change.abs().max())


@pytest.mark.parametrize("name", TRAINERS)
def test_the_mean_has_its_gradient(name, trainer):
    v, x = latents()
    grads = []
    for installed in (False, True):
        if installed:
            trainer.integration.install()
        for sampler in SAMPLERS:
            leaf = v.clone().requires_grad_()
            mean = trainer.step(sampler, INDEX, leaf, x, x).mean
            grads += torch.autograd.grad(mean.square().sum(), leaf)
    for theirs, ours in zip(grads[:3], grads[3:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("name", TRAINERS)
def test_a_rollout_that_is_differentiated_through(name, trainer):
    v, x = latents()
    grads = []
    for installed in (False, True):
        if installed:
            trainer.integration.install()
        leaves = [v.clone().requires_grad_(), x.clone().requires_grad_()]
        drawn = trainer.step("flow_sde", INDEX, *leaves)
        grads.append(torch.autograd.grad(drawn.x_next.square().sum(), leaves))
    for theirs, ours in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("name", TRAINERS)
def test_nothing_waits_and_less_is_launched(name, trainer, monkeypatch):
    theirs = {sampler: counted(trainer, sampler) for sampler in SAMPLERS}
    trainer.integration.install()
    as_on_a_device(monkeypatch)
    for sampler in SAMPLERS:
        ours = counted(trainer, sampler)
        assert ours.reads == 0 and 3 * ours.large < theirs[sampler].large, (sampler, ours, theirs[sampler])


def counted(trainer: Trainer, sampler: str) -> Count:
    v, x = latents(size=(16, 32, 32))
    leaf = v.clone().requires_grad_()
    with Count(x.numel()) as count:
        trainer.step(sampler, INDEX, leaf, x, x).log_prob.sum().backward()
    return count


@pytest.mark.parametrize("name", TRAINERS)
def test_signature_and_identity(name, trainer):
    owner = trainer.owner()
    theirs = vars(owner)[trainer.name]
    signature = _patching.signature_of(theirs)
    trainer.integration.install()
    ours = vars(owner)[trainer.name]
    assert ours is not theirs and _patching.signature_of(ours) == signature
    trainer.integration.install()
    assert vars(owner)[trainer.name] is ours
    trainer.integration.uninstall()
    assert vars(owner)[trainer.name] is theirs
    trainer.integration.uninstall()
    assert inspect.signature(theirs) == inspect.signature(vars(owner)[trainer.name])


@pytest.mark.parametrize("name", TRAINERS)
def test_another_signature_is_refused(name, trainer, monkeypatch):
    owner = trainer.owner()
    monkeypatch.setattr(owner, trainer.name, lambda self, velocity: None)
    with pytest.raises(RuntimeError, match=rf"{trainer.name} is .*\(self, velocity\).*; accepted is .*\(self, "):
        trainer.integration.install()
    assert not trainer.integration._patch.installed


@pytest.mark.parametrize("name", TRAINERS)
def test_another_convention_under_the_known_signature_is_refused(name, trainer, monkeypatch):
    owner = trainer.owner()
    theirs = vars(owner)[trainer.name]

    def another(*given, **named):
        return type(found)(each * 1.001 for each in found) if (found := theirs(*given, **named)) else found

    another.__signature__ = inspect.signature(theirs)  # type: ignore[attr-defined]
    monkeypatch.setattr(owner, trainer.name, another)
    with pytest.raises(RuntimeError, match="computes another"):
        trainer.integration.install()
    assert not trainer.integration._patch.installed


@pytest.mark.parametrize("name", TRAINERS)
def test_exact_is_refused_with_the_reason(name, trainer):
    with pytest.raises(ValueError, match=r"exact is True; accepted for .* is False: "):
        trainer.integration.install(exact=True)
