"""What UniRL alone does: steps without noise, strategies that are not ours, and Flow-DPPO."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from advflow_ext.integrations import unirl
from tests.integrations.counting import Count, as_on_a_device
from tests.integrations.stand_ins.gaussians import log_density, transition
from tests.integrations.steps_of_trainers import LEVELS, SIGMAS, TRAINERS

pytestmark = pytest.mark.filterwarnings("ignore:UniRL casts log-probabilities")
STRATEGIES = {"flow_sde": "FlowSDEStrategy", "dance_sde": "DanceSDEStrategy", "cps": "CPSSDEStrategy"}
STEPS = [1, 2, 3, 4]
THRESHOLD = 1e-7


@pytest.fixture(params=["stand-in", "real"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    TRAINERS["unirl"].load(monkeypatch, request.param)
    yield importlib.import_module("unirl.sde.kernels")
    unirl.uninstall()


class Stage:
    """A stage of UniRL as its SD3's: what it replays is cast to the trajectory's dtype and to logprob_dtype."""

    def __init__(self, strategy: Any, velocity: Tensor, logprob_dtype: torch.dtype = torch.float32) -> None:
        self.strategy, self.velocity, self.logprob_dtype = strategy, velocity, logprob_dtype

    def replay(self, conditions: Any, *, segment: Any, params: Any, step_indices: list[int]) -> Any:
        log_probs, means = [], []
        for place, step in enumerate(step_indices):
            _, log_prob, mean = self.strategy.denoise(
                noise_pred=self.velocity[:, place], sample=segment.latents_at(step),
                prev_sample=segment.latents_at(step + 1), sigma=segment.sigmas[step],
                sigma_next=segment.sigmas[step + 1], eta=float(params.eta), sigma_max=segment.sigmas[1],
                step_index=step,
            )  # fmt: skip
            log_probs.append(log_prob)
            means.append(mean)
        return SimpleNamespace(
            log_probs=torch.stack(log_probs, 1).to(self.logprob_dtype),
            prev_sample_means=torch.stack(means, 1).to(segment.latents.dtype),
        )


def rollout(kernels: Any, sampler: str, samples: int = 48) -> tuple[Any, Any, Tensor]:
    """A bf16 trajectory of ``STEPS``, its strategy, and the velocities it was made with ``[B, S, ...]``."""
    torch.manual_seed(0)
    strategy = getattr(kernels, STRATEGIES[sampler])()
    v = torch.randn(samples, len(STEPS), 4, 16, 16)
    latents = [torch.randn(samples, 4, 16, 16).bfloat16()]
    for place, step in enumerate(STEPS):
        drawn, _, _ = strategy.denoise(
            v[:, place], latents[-1], SIGMAS[step], SIGMAS[step + 1], eta=LEVELS[sampler], sigma_max=SIGMAS[1]
        )
        latents.append(drawn.bfloat16())
    stored = torch.stack(latents, 1)
    segment = SimpleNamespace(
        latents=stored, sigmas=SIGMAS, sde_indices=torch.tensor(STEPS), sde_logp=None, sde_means=None,
        latents_at=lambda step: stored[:, step - STEPS[0]],
    )  # fmt: skip
    return segment, strategy, v


def flow_dppo(strategy: Any, velocity: Tensor, sampler: str, **options: Any) -> Any:
    FlowDPPO = importlib.import_module("unirl.algorithms.flowdppo").FlowDPPO
    return FlowDPPO(
        params=SimpleNamespace(eta=LEVELS[sampler]), stage=Stage(strategy, velocity), kl_mask_threshold=THRESHOLD,
        **{"old_logp_source": "replay", **options},
    )  # fmt: skip


def updated(v: Tensor) -> Tensor:
    """Velocities whose KL from v lies about the threshold."""
    generator = torch.Generator().manual_seed(2)
    sizes = torch.logspace(-4, -2, v.shape[0]).view(-1, 1, 1, 1, 1)
    return v + sizes * torch.randn(v.shape, generator=generator)


def exact(segment: Any, v: Tensor, v_old: Tensor, A: Tensor, sampler: str) -> tuple[Tensor, Tensor]:
    """Loss and mask in float64, with Flow-SDE's sigma in the KL as UniRL has it at that commit."""
    steps = torch.tensor(STEPS)
    s, s_end = (SIGMAS.double()[places].view(1, -1, 1, 1, 1) for places in (steps, steps + 1))
    level = torch.tensor(LEVELS[sampler], dtype=torch.float64)
    x, x_next = (segment.latents[:, places].double() for places in (slice(0, -1), slice(1, None)))
    (mean, _, sigma), (mean_old, _, _) = (
        transition(sampler, velocity.double(), x, s, s_end, level, SIGMAS.double()[1]) for velocity in (v, v_old)
    )
    variance = sampler != "cps"
    log_ratio = torch.stack([
        log_density(x_next[:, j], mean[:, j], sigma[:, j], variance=variance)
        - log_density(x_next[:, j], mean_old[:, j], sigma[:, j], variance=variance)
        for j in range(len(STEPS))
    ], 1)  # fmt: skip
    spread = level * (s / (1 - s.clamp(max=0.99))).sqrt() * (s - s_end).sqrt()
    kl = ((mean - mean_old) ** 2 / (2 * spread**2)).flatten(2).mean(2)
    masked = (kl >= THRESHOLD) & (A[:, None] * log_ratio > 0)
    return torch.where(masked, 0, -A[:, None] * log_ratio.exp()).mean(), masked


def trained(algorithm: Any, segment: Any, leaf: Tensor, A: Tensor) -> Any:
    algorithm.stage.velocity = leaf
    return algorithm.compute_loss_and_backward(
        conditions={}, segment=segment, advantages=A, training_progress=0.0, loss_scale=0.5
    )


@pytest.mark.parametrize("sampler", STRATEGIES)
def test_the_mask_of_flow_dppo_is_that_of_float64(kernels, sampler):
    """Theirs is not: it compares means that were rounded to bfloat16."""
    segment, strategy, v_old = rollout(kernels, sampler)
    A = torch.randn(len(v_old), generator=torch.Generator().manual_seed(4))
    wanted = updated(v_old).requires_grad_()
    loss, masked = exact(segment, wanted, v_old, A, sampler)
    (slope,) = torch.autograd.grad(loss / 2, wanted)
    assert 0.1 < masked.double().mean() < 0.9  # the threshold lies among what is drawn
    errors = []
    for installed in (False, True):
        if installed:
            unirl.install()
        algorithm = flow_dppo(strategy, v_old, sampler)
        algorithm.prepare_segment(conditions={}, segment=segment)
        leaf = wanted.detach().clone().requires_grad_()
        found = trained(algorithm, segment, leaf, A)
        kept = leaf.grad.flatten(2).abs().sum(2) > 0
        errors.append((int((kept == masked).sum()), float((leaf.grad - slope).norm() / slope.norm())))
    (wrong_theirs, gradient_theirs), (wrong_ours, gradient_ours) = errors
    assert wrong_ours == 0 and wrong_theirs > 0
    assert gradient_ours < 1e-6 and gradient_theirs > 0.1
    assert (
        abs(found.loss - float(loss.detach())) < 1e-7 and found.has_backward and found.num_steps_or_tokens == len(STEPS)
    )
    assert found.metrics["masked_fraction"] == pytest.approx(float(masked.double().mean()))
    assert found.metrics["masked_fraction"] + found.metrics["unmasked_fraction"] == 1


@pytest.mark.parametrize("source", ["rollout", "replay"])
def test_an_unchanged_policy_is_not_moved_at_all(kernels, source):
    unirl.install()
    segment, strategy, v = rollout(kernels, "flow_sde", samples=3)
    algorithm = flow_dppo(strategy, v, "flow_sde", old_logp_source=source)
    # As a rollout emits them: cast to float32.
    given = {"segment": segment, "params": algorithm.params, "step_indices": STEPS}
    segment.sde_logp = algorithm.stage.replay({}, **given).log_probs
    algorithm.prepare_segment(conditions={}, segment=segment)
    found = trained(algorithm, segment, v.clone().requires_grad_(), torch.tensor([1.0, -2.0, 0.5]))
    metrics = found.metrics
    assert metrics["ratio_min"] == metrics["ratio_max"] == metrics["ratio_mean"] == 1
    assert metrics["kl_new_old_max"] == metrics["approx_kl"] == metrics["masked_fraction"] == 0
    assert segment.sde_logp.dtype == (torch.float64 if source == "replay" else torch.float32)


def test_velocities_are_kept_as_they_came(kernels):
    unirl.install()
    segment, strategy, v = rollout(kernels, "flow_sde", samples=2)
    algorithm = flow_dppo(strategy, v.bfloat16(), "flow_sde")
    algorithm.prepare_segment(conditions={}, segment=segment)
    assert torch.equal(segment.sde_means, v.bfloat16())


def test_the_kl_without_its_coefficient(kernels):
    unirl.install()
    segment, strategy, v = rollout(kernels, "flow_sde", samples=2)
    algorithm = flow_dppo(strategy, v, "flow_sde", add_kl_coefficient=False)
    algorithm.prepare_segment(conditions={}, segment=segment)
    found = trained(algorithm, segment, updated(v).requires_grad_(), torch.ones(2))
    columns = [strategy.denoise(o * v[:, 0], v[:, 0], SIGMAS[1], SIGMAS[2], eta=0.7)[2] for o in (0, 1)]
    c_v = (columns[1] - columns[0])[0, 0, 0, 0] / v[0, 0, 0, 0, 0]
    first = (c_v * (updated(v) - v)[:, 0]).square().flatten(1).mean(1) / 2
    assert float(found.metrics["kl_new_old_max"]) > float(first.max()) > 0


def test_what_is_not_trained_is_left_to_unirl(kernels):
    unirl.install()
    segment, strategy, v = rollout(kernels, "flow_sde", samples=2)
    algorithm = flow_dppo(strategy, v, "flow_sde")
    segment.sde_indices = torch.tensor([], dtype=torch.int64)
    if not hasattr(kernels, "FlowSpec"):
        pytest.skip("the stand-in takes no empty segment")
    found = trained(algorithm, segment, v, torch.ones(2))
    assert not found.has_backward and found.num_steps_or_tokens == 0


@pytest.mark.parametrize("sampler", STRATEGIES)
def test_a_step_without_noise(kernels, sampler):
    strategy = getattr(kernels, STRATEGIES[sampler])()
    v, x = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    results = []
    for installed in (False, True):
        if installed:
            unirl.install()
        torch.manual_seed(7)
        results.append(strategy.denoise(v, x, SIGMAS[2], SIGMAS[3], eta=0.0, sigma_max=SIGMAS[1]))
        results[-1] += (torch.rand(()),)  # the noise that is thrown away comes from the same stream
    for theirs, ours in zip(*results, strict=True):
        if theirs is None:
            assert ours is None
        else:
            assert ours.dtype == theirs.dtype
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_strategy_of_ones_own_keeps_unirls_denoise(kernels):
    class Own(kernels.FlowSDEStrategy):  # type: ignore[misc,name-defined]
        pass

    own = Own()
    v, x = torch.randn(2, 3, 4, 8, 8)
    given = {"eta": 0.5, "prev_sample": x, "sigma_max": SIGMAS[1], "step_index": 2}
    theirs = own.denoise(v, x, SIGMAS[2], SIGMAS[3], **given)
    unirl.install()
    ours = own.denoise(v, x, SIGMAS[2], SIGMAS[3], **given)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(theirs, ours, strict=True))


def test_flow_dppo_reads_its_metrics_once(kernels, monkeypatch):
    unirl.install()
    segment, strategy, v = rollout(kernels, "flow_sde", samples=2)
    algorithm = flow_dppo(strategy, v, "flow_sde")
    algorithm.prepare_segment(conditions={}, segment=segment)
    leaf = updated(v).requires_grad_()
    as_on_a_device(monkeypatch)
    algorithm._resolve_target_steps = lambda segment: STEPS
    reads: list[int] = []
    tolist = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda self: reads.append(self.numel()) or tolist(self))
    with Count(leaf[:, 0].numel()):
        trained(algorithm, segment, leaf, torch.ones(2))
    assert reads.count(13) == 1


def test_what_it_warns_of(kernels):
    with pytest.warns(RuntimeWarning, match=r"UniRL casts log-probabilities to its logprob_precision, float32 unless"):
        unirl.install()


def test_flow_dppo_with_its_own_repair_stays_untouched(kernels, monkeypatch):
    FlowDPPO = importlib.import_module("unirl.algorithms.flowdppo").FlowDPPO
    theirs = FlowDPPO.compute_loss_and_backward
    monkeypatch.setattr(kernels.SDEStrategy, "transition_std", lambda self: None, raising=False)
    unirl.install()
    assert FlowDPPO.compute_loss_and_backward is theirs and kernels.StepStrategy.denoise is not None


def test_the_later_signature(kernels, monkeypatch):
    """At 4154868 a rollout may hand its generators over."""
    earlier = kernels.StepStrategy.denoise

    def denoise(
        self, noise_pred, sample, sigma, sigma_next, *, eta=1.0, prev_sample=None, generator=None, sigma_max=0.99,
        step_index=0,
    ):  # fmt: skip
        return earlier(self, noise_pred, sample, sigma, sigma_next, eta=eta, prev_sample=prev_sample,
                       sigma_max=sigma_max, step_index=step_index)  # fmt: skip

    monkeypatch.setattr(kernels.StepStrategy, "denoise", denoise)
    unirl.install()
    v, x = torch.randn(2, 3, 4, 8, 8)
    given = {"sigma": SIGMAS[2], "sigma_next": SIGMAS[3], "eta": 0.7}
    first, second = (
        kernels.FlowSDEStrategy().denoise(v, x, generator=torch.Generator().manual_seed(3), **given) for _ in range(2)
    )
    assert torch.equal(first[0], second[0])
