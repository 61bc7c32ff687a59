"""flow_grpo's own rollout and replay on the embedded pipeline, and a step of training with them.

Its ``pipeline_with_logprob`` and ``compute_log_prob`` run as they are; the loss, which stands inline in its ``main``,
is written here: the clipped ratio, and the KL to the reference that divides by std_dev_t.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from advflow_ext.conformance import rollout
from advflow_ext.integrations import flow_grpo
from tests.integrations.named_steps import load_function

PROMPTS = [f"a {colour} {shape}" for colour in ("red", "green", "blue", "yellow") for shape in ("circle", "square")]
STEPS, NOISE_LEVEL, GUIDANCE, CLIP, KL_WEIGHT = 10, 0.7, 4.5, 1e-4, 0.04
A = torch.linspace(-2, 2, len(PROMPTS), dtype=torch.float64)  # as its tracker gives them


class Step(NamedTuple):
    """A step of training at the velocities of an updated policy; gradients are to those."""

    loss: Tensor
    log_ratio: Tensor
    gradient: Tensor


class World:
    """A rollout by whichever ``sde_step_with_logprob`` is in place."""

    def __init__(self, pipeline: Any, its_pipeline: ModuleType, script: ModuleType) -> None:
        self.pipeline, self.script = pipeline, script
        torch.manual_seed(7)
        with torch.no_grad():
            tokens, no_tokens, pooled, no_pooled = pipeline.encode_prompt(PROMPTS, None, None)
            _, latents, log_probs = its_pipeline.pipeline_with_logprob(
                pipeline, prompt=PROMPTS, num_inference_steps=STEPS, guidance_scale=GUIDANCE, noise_level=NOISE_LEVEL,
                output_type="pt",
            )  # fmt: skip
        trajectory = torch.stack(latents, 1)
        self.embeds, self.pooled = torch.cat([no_tokens, tokens]), torch.cat([no_pooled, pooled])
        self.sample = {
            "latents": trajectory[:, :-1],
            "next_latents": trajectory[:, 1:],
            "log_probs": torch.stack(log_probs, 1),
            "timesteps": pipeline.scheduler.timesteps.repeat(len(PROMPTS), 1),
        }
        self.config = SimpleNamespace(
            train=SimpleNamespace(cfg=True),
            sample=SimpleNamespace(guidance_scale=GUIDANCE, noise_level=NOISE_LEVEL),
        )

    def replay(self, transformer: Any, j: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        found: tuple[Tensor, Tensor, Tensor, Tensor] = self.script.compute_log_prob(
            transformer, self.pipeline, self.sample, j, self.embeds, self.pooled, self.config
        )
        return found

    def velocities(self, j: int) -> Tensor:
        """Of the rollout policy, both halves of the guidance."""
        with torch.no_grad():
            velocity: Tensor = self.pipeline.transformer(
                hidden_states=torch.cat([self.sample["latents"][:, j]] * 2),
                timestep=torch.cat([self.sample["timesteps"][:, j]] * 2),
                encoder_hidden_states=self.embeds,
                pooled_projections=self.pooled,
                return_dict=False,
            )[0]
        return velocity

    def step(self, j: int, v: Tensor, v_ref: Tensor) -> Step:
        leaf = v.clone().requires_grad_()
        _, log_prob, mean, std_dev_t = self.replay(lambda **_: (leaf,), j)
        with torch.no_grad():
            mean_ref = self.replay(lambda **_: (v_ref,), j)[2]
        return _backward(leaf, log_prob - self.sample["log_probs"][:, j], mean, mean_ref, std_dev_t)

    def truth(self, j: int, v: Tensor, v_old: Tensor, v_ref: Tensor) -> Step:
        """The same in float64 from the stored latents."""
        sigmas = self.pipeline.scheduler.sigmas.double()
        x, x_next = (self.sample[key][:, j].double() for key in ("latents", "next_latents"))

        def at(velocity: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            without, text = velocity.double().chunk(2)
            guided = without + GUIDANCE * (text - without)
            mean, std_dev_t, sqrt_dt = rollout.flow_sde_in_parts(
                guided, x, sigmas[j], sigmas[j + 1], NOISE_LEVEL, sigmas[1]
            )
            return mean, std_dev_t, rollout.log_prob(x_next, (mean, std_dev_t * sqrt_dt))

        leaf = v.double().requires_grad_()
        mean, std_dev_t, log_prob = at(leaf)
        return _backward(leaf, log_prob - at(v_old)[2], mean, at(v_ref)[0], std_dev_t.view(1, 1, 1, 1))


def _backward(leaf: Tensor, log_ratio: Tensor, mean: Tensor, mean_ref: Tensor, std_dev_t: Tensor) -> Step:
    kl = ((mean - mean_ref) ** 2).mean((1, 2, 3), keepdim=True) / (2 * std_dev_t**2)
    loss = rollout.clipped(log_ratio.exp(), A, CLIP) + KL_WEIGHT * kl.mean()
    loss.backward()
    assert leaf.grad is not None
    return Step(loss.detach(), log_ratio.detach(), leaf.grad)


@contextmanager
def trainer(monkeypatch: pytest.MonkeyPatch, checkout: Path) -> Iterator[tuple[Any, ModuleType, ModuleType]]:
    """The embedded pipeline, flow_grpo's module of its pipeline, and its script's ``compute_log_prob``."""
    from advflow.models.sd3 import pipeline_folder
    from diffusers import StableDiffusion3Pipeline

    monkeypatch.syspath_prepend(str(checkout))
    its_pipeline = import_module("flow_grpo.diffusers_patch.sd3_pipeline_with_logprob")
    script = load_function(monkeypatch, "train_sd3", "compute_log_prob", checkout / "scripts/train_sd3.py")
    vars(script)[flow_grpo.NAME] = vars(import_module(flow_grpo.MODULE))[flow_grpo.NAME]  # by value, as it does
    pipeline = StableDiffusion3Pipeline.from_pretrained(pipeline_folder("embedded"))
    pipeline.set_progress_bar_config(disable=True)
    pipeline.transformer.requires_grad_(False)
    try:
        yield pipeline, its_pipeline, script
    finally:
        flow_grpo.uninstall()
        for name in [name for name in sys.modules if name.partition(".")[0] == "flow_grpo"]:
            del sys.modules[name]
