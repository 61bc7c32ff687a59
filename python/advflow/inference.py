"""Using what a run has learnt: evaluation and sampling from its last checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline

from advflow.checkpoint import checkpoints, load_checkpoint
from advflow.config import TrainConfig
from advflow.evaluate import Evaluation, evaluate
from advflow.model import LatentShape, Sampler, encode_prompts, load_pipeline, pick_device
from advflow.policies import Policies, make_policies
from advflow.prompts import load_eval_prompts
from advflow.randomness import generator
from advflow.rewards import load_reward
from advflow.sampling import decode, sample_latents, sigma_grid


@dataclass(frozen=True)
class LoadedRun:
    """A run's settings, its pipeline, and its policies at the last checkpoint."""

    config: TrainConfig
    pipeline: StableDiffusion3Pipeline
    policies: Policies

    @property
    def sampler(self) -> Sampler:
        latent = LatentShape.of(self.pipeline, self.config.model.resolution)
        return Sampler(self.pipeline.vae, self.pipeline.scheduler, latent)


def load_run(folder: Path, config: TrainConfig, base: bool) -> LoadedRun:
    """Loads the run in `folder`; with `base`, as it was before its first iteration."""
    saved = checkpoints(folder / "checkpoints")
    if not base and not saved:
        raise FileNotFoundError(f"run {str(folder)!r} has no checkpoint yet; --base uses the model before training")
    pipeline = load_pipeline(config.model, pick_device(config.device))
    policies = make_policies(pipeline.transformer, config.model, config.runtime, config.seed)
    if not base:
        load_checkpoint(saved[-1], policies, optimizer=None)
    return LoadedRun(config, pipeline, policies)


def evaluate_run(run: LoadedRun) -> Evaluation:
    """Scores the learner on the run's held-out prompts, as training does."""
    config = run.config
    reward = load_reward(config.data.reward, config.data.reward_args)
    prompts = load_eval_prompts(config.data.eval_prompts, config.evaluation.prompts_per_category)
    return evaluate(
        run.policies.transformer("learner", for_images=True),
        run.sampler,
        prompts,
        encode_prompts(run.pipeline, prompts, config.model.max_sequence_length),
        reward,
        sigma_grid(run.pipeline.scheduler, config.evaluation.steps),
        config.rollout.batch,
    )


def draw_images(run: LoadedRun, prompt: str, count: int, steps: int, seed: int) -> torch.Tensor:
    """Draws `count` images of `prompt` from the learner. Returns fp32 [count, 3, H, W] in [0, 1] on the CPU."""
    embeddings = encode_prompts(run.pipeline, [prompt] * count, run.config.model.max_sequence_length)
    noise = run.sampler.latent.noise(count, generator(seed, "sample", 0), embeddings.tokens.device)
    sigmas = sigma_grid(run.pipeline.scheduler, steps)
    latents = sample_latents(run.policies.transformer("learner", for_images=True), noise, sigmas, embeddings)
    return decode(run.pipeline.vae, latents).cpu()
