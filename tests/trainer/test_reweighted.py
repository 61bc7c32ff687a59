"""Learning from a rollout's own forward passes: what the ordinary way learns, without its passes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from advflow.algorithms import require_proportional
from advflow.policies import GraphedPolicies, follow
from advflow.run.process import make_process
from advflow.run.trainer import Trainer
from advflow.settings.config import TrainConfig
from advflow.settings.data import RolloutConfig
from advflow.settings.methods import FlowGRPOConfig
from advflow.settings.model import ModelConfig, RuntimeConfig
from advflow.settings.optim import OptimConfig, RolloutPolicyConfig
from advflow.settings.processes import SDEConfig
from advflow.settings.registry import METHODS

Make = Callable[..., TrainConfig]
SDE = SDEConfig(steps=2)
SETTINGS: dict[str, Any] = {
    "model": ModelConfig(trainable="lora", lora_rank=4, lora_alpha=8),
    "optim": OptimConfig(micro_batch=5, warmup=0),
    "rollout_policy": RolloutPolicyConfig(rate=0.0),
    "sde": replace(SDE, reweight=True),
}


def _config(algorithm: str = "flow_grpo", **changes: Any) -> TrainConfig:
    rollout = RolloutConfig(prompts=3, images_per_prompt=4, steps=3, batch=8)  # batches of 8 and 4
    return TrainConfig(algorithm=algorithm, **({"rollout": rollout} | SETTINGS | changes))


def _moved(trainer: Trainer) -> Trainer:
    """With adapters that do something: a new one is B = 0, for which A has no gradient."""
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in trainer.policies.learner:
            weight.add_(torch.randn(weight.shape, generator=rng), alpha=0.05)
    follow(trainer.policies, 0.0)
    return trainer


@pytest.fixture(scope="module")
def trainer() -> Trainer:
    return _moved(Trainer(_config(rollout=RolloutConfig(prompts=3, images_per_prompt=4, steps=3, batch=8, guidance=2))))


def _gradients(
    trainer: Trainer, config: TrainConfig, change: Callable[[Any], None] = lambda process: None
) -> tuple[list[torch.Tensor | None], int]:
    """Those of an iteration, and how many images its passes were given. The weights stay what they are."""
    images: list[int] = []
    family = trainer.policies.family
    velocity = family.velocity
    trainer.config = config
    trainer.process = make_process(config, trainer.policies, trainer.latents, trainer.sampler).process
    change(trainer.process)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(family, "velocity", lambda *given: images.append(len(given[1])) or velocity(*given))
        experience, _ = trainer.roll_out(0)
        for losses in trainer.process.steps(0, experience):
            for loss in losses:
                (loss.out.loss * loss.weight).backward()
    gradients = [weight.grad for weight in trainer.policies.learner]
    trainer.optimizer.zero_grad(set_to_none=True)
    return gradients, sum(images)


@pytest.fixture(scope="module")
def ordinary(trainer: Trainer) -> list[torch.Tensor | None]:
    return _gradients(trainer, _config(sde=SDE))[0]


def _assert_same(found: list[torch.Tensor | None], right: list[torch.Tensor | None]) -> None:
    assert sum(each is not None and bool(each.any()) for each in right) > 50
    for one, other in zip(found, right, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert (one - other).norm() <= 1e-5 * other.norm()


@pytest.mark.parametrize(
    ("algorithm", "sampler", "guidance"),
    [
        ("flow_grpo", "flow_sde", 1.0),
        ("flow_cps", "cps", 1.0),
        ("grpo_guard", "flow_sde", 2.0),
        ("flow_dppo", "flow_sde", 1.0),
    ],
)
def test_the_gradient_is_that_of_a_second_pass(trainer: Trainer, algorithm: str, sampler: Any, guidance: float) -> None:
    """And of 12 images and 3 steps, 2 of them learnt from, the passes are fewer by those 24, of guided ones by 48."""
    rollout = RolloutConfig(prompts=3, images_per_prompt=4, steps=3, batch=8, guidance=guidance)
    right, passes = _gradients(trainer, _config(algorithm, rollout=rollout, sde=replace(SDE, sampler=sampler)))
    sde = replace(SDE, sampler=sampler, reweight=True)
    found, fewer = _gradients(trainer, _config(algorithm, rollout=rollout, sde=sde))
    _assert_same(found, right)
    halves = 1 if guidance == 1 else 2
    assert (passes, fewer) == (60 * halves, 36 * halves)


def test_two_iterations_train_the_same_weights(small_config: Make) -> None:
    rows, weights = [], []
    for sde in (SDE, replace(SDE, reweight=True)):
        trainer = _moved(Trainer(small_config(algorithm="flow_grpo", **(SETTINGS | {"sde": sde}))))
        rows.append([trainer.iterate(iteration) for iteration in range(2)])
        weights.append([weight.detach().clone() for weight in trainer.policies.learner])
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-5, atol=1e-5)
    for row, ordinary in zip(rows[1], rows[0], strict=True):
        assert row.keys() == ordinary.keys() and row["first_max_log_ratio"] == 0 and row["skipped_steps"] == 0
        for name in ("reward", "grad_norm", "advantage_rms", "lr", "nonfinite_samples"):
            assert row[name] == pytest.approx(ordinary[name], rel=1e-4), name


def test_a_broken_image_breaks_no_other(trainer: Trainer) -> None:
    """Image 0 is not finite from its first step on: its own gradient, which is not either, counts for nothing."""

    def breaking(process: Any) -> None:
        starting_noise = process.starting_noise

        def with_nan(noise: torch.Tensor) -> torch.Tensor:
            noise = starting_noise(noise).clone()
            noise[0] = math.nan
            return noise

        process.starting_noise = with_nan

    right, _ = _gradients(trainer, _config(sde=SDE), breaking)
    found, _ = _gradients(trainer, _config(), breaking)
    _assert_same(found, right)


def test_recorded_passes_give_it_too(
    trainer: Trainer, ordinary: list[torch.Tensor | None], recordings: list[Callable[[], None]]
) -> None:
    plain = trainer.policies
    try:
        trainer.policies = GraphedPolicies(plain)
        found, _ = _gradients(trainer, _config(runtime=RuntimeConfig(cuda_graphs=True)))
    finally:
        trainer.policies = plain
    assert len(recordings) == 6  # of 8 images and of 4: forward passes with a gradient and without, backward passes
    _assert_same(found, ordinary)


def test_checkpointed_passes_give_it_too(trainer: Trainer, ordinary: list[torch.Tensor | None]) -> None:
    transformer: Any = trainer.policies.transformer("learner")
    transformer.enable_gradient_checkpointing()
    checkpoint, blocks = transformer._gradient_checkpointing_func, []
    transformer._gradient_checkpointing_func = lambda block, *given: blocks.append(block) or checkpoint(block, *given)
    try:
        found, _ = _gradients(trainer, _config())
    finally:
        transformer.disable_gradient_checkpointing()
    assert len(blocks) == 2 * 2 * len(transformer.transformer_blocks)  # two batches, two steps learnt from
    _assert_same(found, ordinary)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"optim": OptimConfig(steps_per_iteration=2)},
            r"optim.steps_per_iteration is 2; accepted: 1 with sde.reweight",
        ),
        ({"sde": SDEConfig(steps=2, reweight=True, epochs=2)}, r"sde.epochs is 2; accepted: 1 with sde.reweight"),
        (
            {"sde": SDEConfig(steps=2, reweight=True, trained_share=0.5)},
            r"sde.trained_share is 0.5; accepted: 1.0 with",
        ),
        (
            {"sde": SDEConfig(steps=2, reweight=True, anchor="replay")},
            r"sde.anchor is 'replay'; accepted: 'stored' with",
        ),
        (
            {
                "sde": SDEConfig(steps=1, window="branch", reweight=True, shared_anchor=True),
            },
            r"sde.shared_anchor is True; accepted: False with sde.reweight",
        ),
        (
            {
                "sde": SDEConfig(steps=1, window="branch", within=2, branches=2, reweight=True),
                "rollout": RolloutConfig(prompts=2, images_per_prompt=4, steps=3, batch=8),
            },
            r"sde.branches is 2; accepted: 1 with sde.reweight",
        ),
        ({"model": ModelConfig()}, r"model.trainable is 'full'; accepted: 'lora' with sde.reweight"),
        ({"runtime": RuntimeConfig(fused=False)}, r"runtime.fused is False; accepted: True with sde.reweight"),
        ({"runtime": RuntimeConfig(shard=True)}, r"runtime.shard is True; accepted: False with sde.reweight"),
        ({"runtime": RuntimeConfig(compile="regional")}, r"runtime.compile is 'regional'; accepted: 'none' with"),
        (
            {"runtime": RuntimeConfig(merge_lora="all")},
            r"runtime.merge_lora is 'all'; accepted: 'images' or 'none' with",
        ),
        (
            {"rollout_policy": RolloutPolicyConfig(rate=0.1)},
            r"rollout_policy.rate is 0.1; accepted: 0 with sde.reweight",
        ),
    ],
)
def test_what_it_cannot_be_exact_for_is_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        _config(**changes)


def test_a_rollout_by_the_learner_is_on_policy_whatever_follows_it() -> None:
    rollout = RolloutConfig(policy="learner")
    assert _config(rollout=rollout, rollout_policy=RolloutPolicyConfig(rate=0.1)).sde.reweight


def test_a_loss_with_a_part_that_no_advantage_scales_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(ValueError, match=r"sde.reweight is True; accepted is False with flow_grpo as it is set: where"):
        Trainer(_config(flow_grpo=FlowGRPOConfig(kl_weight=0.01)))


@pytest.mark.parametrize("algorithm", [name for name, method in METHODS.items() if method.process == "reverse"])
def test_without_a_reference_every_method_of_the_reverse_process_is_in_proportion(algorithm: str) -> None:
    require_proportional(algorithm, METHODS[algorithm].settings())  # type: ignore[misc]
