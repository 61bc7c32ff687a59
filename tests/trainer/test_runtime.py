"""What makes a run faster acts where it may, and nowhere else."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from advflow.algorithms import make_algorithm
from advflow.policies import LoraPolicies
from advflow.run.train import train
from advflow.run.trainer import Trainer
from advflow.settings.config import TrainConfig
from advflow.settings.data import RolloutConfig
from advflow.settings.methods import FlowGRPOConfig
from advflow.settings.model import ModelConfig, RuntimeConfig
from advflow.settings.optim import OptimConfig, RolloutPolicyConfig
from advflow.settings.processes import SDEConfig
from advflow.settings.registry import METHODS
from diffusers import SD3Transformer2DModel
from torch import nn
from torch.nn.attention import SDPBackend

from tests.trainer.runs import timeless
from tests.trainer.test_ranks import config_of

Make = Callable[..., TrainConfig]
LORA = ModelConfig(trainable="lora", lora_rank=4, lora_alpha=8)
REVERSE_SDE = SDEConfig(window="random", steps=1, within=2)


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, bool, bool]]]:
    """(policy, merged, gradients on) of every forward pass of LoRA policies."""
    sets: list[Any] = []
    real = LoraPolicies.__init__

    def remember(self: LoraPolicies, *arguments: object) -> None:
        real(self, *arguments)  # type: ignore[arg-type]
        sets.append(self._policies)

    seen: list[tuple[str, bool, bool]] = []
    forward = SD3Transformer2DModel.forward

    def record(self: nn.Module, *arguments: object, **settings: object) -> object:
        seen.append((sets[-1].active, sets[-1].merged, torch.is_grad_enabled()))
        return forward(self, *arguments, **settings)

    monkeypatch.setattr(LoraPolicies, "__init__", remember)
    monkeypatch.setattr(SD3Transformer2DModel, "forward", record)
    yield seen


ROLLOUT, OLD, LEARNER = ("rollout", True, False), ("rollout", False, False), ("learner", False, True)
REFERENCE, EVALUATED = ("reference", False, False), ("learner", True, False)


@pytest.mark.parametrize(
    ("merge", "algorithm", "anchor", "expected"),
    [
        ("images", "advantage_flow", "stored", {ROLLOUT, OLD, REFERENCE, LEARNER, EVALUATED}),
        ("images", "flow_grpo", "stored", {OLD, LEARNER, EVALUATED}),
        ("images", "flow_grpo", "replay", {ROLLOUT, OLD, LEARNER, EVALUATED}),
        ("all", "advantage_flow", "stored", {ROLLOUT, REFERENCE, LEARNER, EVALUATED}),
        ("all", "flow_grpo", "stored", {ROLLOUT, LEARNER, EVALUATED}),
        ("none", "advantage_flow", "stored", {OLD, REFERENCE, LEARNER, ("learner", False, False)}),
    ],
)
def test_only_images_are_made_on_merged_weights(
    small_config: Make, forwards: list[Any], merge: Any, algorithm: str, anchor: Any, expected: set[Any]
) -> None:
    sde = replace(REVERSE_SDE, anchor=anchor)
    trainer = Trainer(small_config(algorithm=algorithm, model=LORA, runtime=RuntimeConfig(merge_lora=merge), sde=sde))
    trainer.iterate(0)
    trainer.evaluate()
    assert set(forwards) == expected


def test_too_little_memory_means_unmerged(small_config: Make, forwards: list[Any]) -> None:
    trainer = Trainer(small_config(model=LORA, runtime=RuntimeConfig(merged_gigabytes=0.0)))
    trainer.iterate(0)
    assert set(forwards) == {OLD, REFERENCE, LEARNER}
    with pytest.raises(ValueError, match=r"runtime.merged_gigabytes is -1.0; accepted: zero or more"):
        RuntimeConfig(merged_gigabytes=-1.0)


@pytest.mark.parametrize("algorithm", METHODS)
def test_no_method_needs_a_reference_without_weight(algorithm: str) -> None:
    weight = "lam" if algorithm == "advantage_flow" else "kl_weight"
    for value, needed in ((0.0, False), (0.1, True)):
        settings = METHODS[algorithm].settings(**{weight: value})  # type: ignore[misc]
        assert make_algorithm(algorithm, settings).needs.reference is needed


@pytest.mark.parametrize("algorithm", ["advantage_flow", "flow_grpo"])
def test_a_reference_nobody_needs_is_never_run(small_config: Make, forwards: list[Any], algorithm: str) -> None:
    config = small_config(algorithm=algorithm, model=LORA, sde=REVERSE_SDE)
    config.advantage_flow.lam = config.flow_grpo.kl_weight = 0.0
    Trainer(config).iterate(0)
    assert "reference" not in {policy for policy, *_ in forwards}


def test_the_modulation_cache_changes_no_bit_and_halves_its_work(
    small_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, calls = [], []
    for cache in (True, False):
        trainer = Trainer(small_config(model=LORA, runtime=RuntimeConfig(modulation_cache=cache)))
        linear = trainer.policies.transformer("learner").transformer_blocks[0].norm1.linear
        made: list[object] = []
        real = torch.nn.functional.linear

        def count(x: Any, weight: Any, bias: Any = None, mine: Any = linear.weight, made: Any = made) -> Any:
            if weight is mine:
                made.append(x)
            return real(x, weight, bias)  # noqa: B023

        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.functional, "linear", count)
            row = trainer.iterate(0)
        rows.append(timeless(row))
        calls.append(len(made))
    assert rows[0] == rows[1]
    sampled, micro_batches = 3 * 2, 2 * 3  # solver steps times batches; pairs times micro-batches
    assert calls == [sampled + micro_batches, sampled + 3 * micro_batches]


@pytest.mark.parametrize("algorithm", ["advantage_flow", "flow_grpo"])
@pytest.mark.parametrize("model", [LORA, ModelConfig()], ids=["lora", "full"])
def test_replayed_passes_change_no_number(
    small_config: Make, recordings: list[Any], model: ModelConfig, algorithm: str
) -> None:
    rows = []
    for replayed in (False, True):
        runtime = RuntimeConfig(cuda_graphs=replayed, modulation_cache=False)
        trainer = Trainer(small_config(algorithm=algorithm, model=model, sde=REVERSE_SDE, runtime=runtime))
        assert bool(recordings) is False
        found = [trainer.iterate(iteration) for iteration in range(2)]
        rows.append([timeless(row) for row in found])
        assert bool(recordings) is replayed
    assert rows[0] == rows[1]


def test_merging_what_a_ratio_is_anchored_on_is_seen_and_said(small_config: Make) -> None:
    floors = {}
    for merge in ("images", "all"):
        trainer = Trainer(
            small_config(
                algorithm="flow_grpo",
                model=replace(LORA, dtype="bfloat16"),
                sde=REVERSE_SDE,
                rollout=RolloutConfig(prompts=3, images_per_prompt=4, steps=3, batch=12),
                optim=OptimConfig(micro_batch=12, lr=1e-2, warmup=0),
                rollout_policy=RolloutPolicyConfig(rate=0.0),
                flow_grpo=FlowGRPOConfig(clip=1e-7),
                runtime=RuntimeConfig(merge_lora=merge),  # type: ignore[arg-type]
            )
        )
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            trainer.iterate(0)
            floors[merge] = trainer.iterate(1)["first_max_log_ratio"]
        advice = "it would act on rounding. Use runtime.merge_lora=images, sde.anchor"
        assert any(advice in str(warning.message) for warning in said) == (merge == "all")
    assert floors["all"] > 10 * floors["images"]


@pytest.mark.slow
@pytest.mark.parametrize("model", [ModelConfig(), LORA], ids=["full", "lora"])
def test_compiled_blocks_train_like_stock_ones(
    small_config: Make, monkeypatch: pytest.MonkeyPatch, model: ModelConfig
) -> None:
    torch._dynamo.reset()
    real, compiled = nn.Module.compile, []

    def with_a_quick_backend(self: nn.Module) -> None:
        compiled.append(type(self).__name__)
        real(self, backend="aot_eager")

    monkeypatch.setattr(nn.Module, "compile", with_a_quick_backend)
    rows = []
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=True):
        for choice in ("none", "regional"):
            trainer = Trainer(small_config(model=model, runtime=RuntimeConfig(compile=choice)))  # type: ignore[arg-type]
            rows.append([trainer.iterate(iteration) for iteration in range(2)])
    blocks = len(trainer.policies.transformer("learner").transformer_blocks)
    assert compiled == ["JointTransformerBlock"] * blocks * (1 if model is LORA else 3)
    for stock, ours in zip(*rows, strict=True):
        for name in ("reward", "loss", "grad_norm"):
            assert ours[name] == pytest.approx(stock[name], rel=1e-3), name


def test_fused_layers_train_the_same(small_config: Make) -> None:
    rows = {}
    for fused in (False, True):
        trainer = Trainer(small_config(model=LORA, runtime=RuntimeConfig(fused=fused)))
        transformer = trainer.policies.transformer("learner")
        assert hasattr(transformer.transformer_blocks[0], "_advflow_patch") == fused
        assert hasattr(transformer.transformer_blocks[0].attn.to_q, "_advflow_patch") == fused
        rows[fused] = trainer.iterate(0)
    assert rows[True]["loss"] == pytest.approx(rows[False]["loss"], rel=1e-4)
    assert rows[True]["grad_norm"] == pytest.approx(rows[False]["grad_norm"], rel=1e-4)


def _kernels() -> tuple[int, str]:
    """Which attention is asked first, by its number, and how fp32 matrix products are made."""
    return torch._C._get_sdp_priority_order()[0], torch.get_float32_matmul_precision()


def test_a_run_has_the_kernels_it_asks_for_and_leaves_the_process_as_it_was(
    small_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, seen = _kernels(), []

    class Seen(Exception):
        pass

    def look(*_: object) -> None:
        seen.append(_kernels())
        raise Seen

    monkeypatch.setattr("advflow.run.train.Trainer", look)
    for name, number in (("cudnn", SDPBackend.CUDNN_ATTENTION.value), ("auto", before[0])):
        with pytest.raises(Seen):
            train(small_config(runtime=RuntimeConfig(attention=name, tf32=name == "cudnn")), resume=False)
        assert seen[-1] == (number, "high" if name == "cudnn" else before[1]) and _kernels() == before


def test_an_attention_that_nobody_knows_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        config_of(["--runtime.attention", "sage"])
    assert "runtime.attention is 'sage'; accepted: 'auto', 'flash', 'cudnn'," in capsys.readouterr().err
