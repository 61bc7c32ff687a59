"""Classifier-free guidance: of what is drawn, of what is learnt from, and of evaluation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", reason="the trainer's dependencies are not installed")

import advflow.run.trainer as trainer_module
from advflow.algorithms.batch import Needs
from advflow.cli import main
from advflow.core.randomness import generator
from advflow.models.sd3 import load_pipeline
from advflow.policies import policy_velocities
from advflow.run.inference import draw_images, load_run
from advflow.run.train import train
from advflow.run.trainer import Trainer
from advflow.samplers.guidance import Guided, guide
from advflow.settings.capability import CapabilityConfig
from advflow.settings.config import TrainConfig
from advflow.settings.data import DataConfig, EvalConfig, RolloutConfig
from advflow.settings.model import ModelConfig, RuntimeConfig
from advflow.settings.processes import DrawConfig, SDEConfig
from advflow.settings.sources import load_run_config

Make = Callable[..., TrainConfig]
PROMPT, NEGATIVE = "a photo of a red circle", "a photo of two blue squares"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of one iteration with every guidance above 1, and a negative prompt."""
    out = tmp_path_factory.mktemp("guided") / "run"
    config = TrainConfig(
        iterations=1,
        out=str(out),
        rollout=RolloutConfig(prompts=2, images_per_prompt=2, steps=3, batch=4, guidance=2.5, negative_prompt=NEGATIVE),
        draws=DrawConfig(per_image=2, guidance=1.5),
        evaluation=EvalConfig(steps=2, prompts_per_category=1, guidance=3.0),
        data=DataConfig(embeddings_cache=str(out.with_name("cache"))),
        capability=CapabilityConfig(candidates=3),
    )
    train(config, resume=False)
    return out


def test_images_are_those_of_the_stock_pipeline(run: Path) -> None:
    """Guidance 4.5, fp32, four steps."""
    loaded = load_run(run, load_run_config(str(run)), base=True)
    ours = draw_images(loaded, PROMPT, 2, 4, 7, 4.5, NEGATIVE)
    noise = loaded.model.latents.noise(2, generator(7, "sample", 0), torch.device("cpu"))
    stock = load_pipeline(ModelConfig(), torch.device("cpu"))(
        PROMPT,
        negative_prompt=NEGATIVE,
        num_images_per_prompt=2,
        guidance_scale=4.5,
        num_inference_steps=4,
        latents=noise,
        max_sequence_length=ModelConfig().max_sequence_length,
        output_type="pt",
    ).images
    assert (ours - stock).abs().max() < 1e-3
    assert (ours - draw_images(loaded, PROMPT, 2, 4, 7, 1.0, NEGATIVE)).abs().max() > 0.1


def test_the_gradient_is_plain_autograds_of_a_settled_unconditional_half(small_config: Make) -> None:
    trainer = Trainer(small_config(rollout=RolloutConfig(3, 4, 3, 8, guidance=4.5, negative_prompt=NEGATIVE)))
    policies, family = trainer.policies, trainer.policies.family
    told = trainer.conditioning[torch.tensor([0, 1, 2])]
    guided = guide(told, trainer._untold, 4.5)
    assert isinstance(guided, Guided)
    x, t = torch.randn(3, *trainer.latents.shape), torch.tensor([0.9, 0.5, 0.2])
    v, v_old, v_ref = policy_velocities(policies, Needs(old=True, reference=True), x, t, guided)
    weight = torch.randn_like(v)
    (v * weight).sum().backward()
    found = [parameter.grad for parameter in policies.learner]

    learner, timestep = policies.transformer("learner"), family.timesteps(t)
    untold = family.velocity(learner, x, timestep, guided.untold_of_each)
    expected = untold.detach() + 4.5 * (family.velocity(learner, x, timestep, told) - untold.detach())
    torch.testing.assert_close(v, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(v_old, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(v_ref, expected, rtol=1e-4, atol=1e-4)
    expected_grads = torch.autograd.grad((expected * weight).sum(), policies.learner)
    for grad, right in zip(found, expected_grads, strict=True):
        assert grad is not None
        torch.testing.assert_close(grad, right, rtol=1e-3, atol=1e-5 * right.abs().max().item() + 1e-8)


@pytest.mark.parametrize(
    ("trainable", "merge", "anchor"),
    [("full", "images", "stored"), ("lora", "all", "stored"), ("lora", "images", "replay")],
)
def test_the_reverse_process_learns_with_the_guidance_that_drew(
    small_config: Make, trainable: Any, merge: Any, anchor: Any
) -> None:
    """Before an update the learner's guided velocity is the one that was kept, so that the ratio is 1."""
    trainer = Trainer(
        small_config(
            algorithm="flow_grpo",
            rollout=RolloutConfig(3, 4, 3, 8, guidance=3.0, negative_prompt=NEGATIVE),
            model=ModelConfig(trainable=trainable, lora_rank=4),
            runtime=RuntimeConfig(merge_lora=merge),
            sde=SDEConfig(steps=2, anchor=anchor),
        )
    )
    row = trainer.iterate(0)
    # Merged weights are another rounding of the same policy, three times as large after guidance by 3.
    assert row["first_max_log_ratio"] < (1e-3 if merge == "all" else 1e-5)
    assert row["grad_norm"] > 0 and row["skipped_steps"] == 0


def test_the_forward_process_may_draw_with_it_and_learn_without(small_config: Make) -> None:
    """DiffusionNFT's: what is drawn is guided, and what is learnt is a policy that needs no guidance."""
    trainer = Trainer(small_config(rollout=RolloutConfig(3, 4, 3, 8, guidance=4.5)))
    experience, _ = trainer.roll_out(0)
    assert not isinstance(experience.conditioning, Guided)
    plain = Trainer(small_config()).roll_out(0)[0]
    assert (experience.x0 - plain.x0).abs().max() > 0.1
    learns_guided = Trainer(small_config(draws=DrawConfig(per_image=2, guidance=2.0)))
    told = learns_guided.roll_out(0)[0].conditioning
    assert isinstance(told, Guided) and told.scale == 2.0
    torch.testing.assert_close(learns_guided.roll_out(0)[0].x0, plain.x0, rtol=0, atol=0)


def test_candidates_are_drawn_as_the_images_are(small_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    score = trainer_module.score_candidates
    monkeypatch.setattr(trainer_module, "score_candidates", lambda *given: seen.append(given[3]) or score(*given))
    config = small_config(rollout=RolloutConfig(3, 4, 3, 8, guidance=4.5), capability=CapabilityConfig(candidates=5))
    Trainer(config).roll_out(0)
    (told,) = seen
    assert isinstance(told, Guided) and told.scale == 4.5 and len(told) == 5


def test_evaluation_is_guided_by_its_own_scale(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = {}
    for words in ([], ["--guidance", "3"], ["--guidance", "1"]):
        main(["eval", "--run", str(run), *words])
        scores[" ".join(words)] = capsys.readouterr().out
    assert scores[""] == scores["--guidance 3"] != scores["--guidance 1"]


def test_a_picture_is_guided_by_the_runs_scale_and_prompt(run: Path, tmp_path: Path) -> None:
    drawn = {}
    for name, words in {
        "run": [],
        "same": ["--guidance", "3", "--negative_prompt", NEGATIVE],
        "none": ["--guidance", "1"],
        "other": ["--negative_prompt", ""],
    }.items():
        out = tmp_path / f"{name}.png"
        main(
            ["sample", "--run", str(run), "--prompt", PROMPT, "--count", "2", "--steps", "2", "--out", str(out), *words]
        )
        drawn[name] = out.read_bytes()
    assert drawn["run"] == drawn["same"] and len(set(drawn.values())) == 3


@pytest.mark.parametrize("command", ["eval", "sample"])
def test_a_negative_scale_is_refused_before_anything_is_loaded(command: str, tmp_path: Path) -> None:
    words = [command, "--run", str(tmp_path / "none"), "--guidance", "-1"]
    with pytest.raises(SystemExit, match=r"--guidance is -1.0; accepted: zero, a positive number or null"):
        main([*words, "--prompt", PROMPT] if command == "sample" else words)


def test_settings_that_would_do_nothing_are_refused(small_config: Make) -> None:
    with pytest.raises(ValueError, match=r"rollout.negative_prompt is 'x'; accepted: \"\" where no guidance"):
        small_config(rollout=RolloutConfig(negative_prompt="x"))
    with pytest.raises(ValueError, match=r"draws.guidance is 2.0; accepted: 1 with \"flow_grpo\""):
        small_config(algorithm="flow_grpo", sde=SDEConfig(steps=1), draws=DrawConfig(guidance=2.0))
    for section, make in (("rollout", RolloutConfig), ("draws", DrawConfig), ("evaluation", EvalConfig)):
        with pytest.raises(ValueError, match=rf"{section}.guidance is -0.5; accepted: zero or a positive number"):
            make(guidance=-0.5)
