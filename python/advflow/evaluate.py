"""Scoring a policy on held-out prompts, always from the same noise."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import SD3Transformer2DModel

from advflow.model import Sampler
from advflow.randomness import generator
from advflow.rewards import Reward
from advflow.sampling import PromptEmbeddings, decode, sample_latents

_NOISE_SEED = 0  # of no run: every run, whatever its seed, is judged on the same noise


@dataclass(frozen=True)
class Evaluation:
    """`overall` is the mean over categories of the mean score; `images` [N, 3, H, W] are what was scored."""

    overall: float
    reward: float
    categories: dict[str, float]
    images: torch.Tensor


def evaluate(
    transformer: SD3Transformer2DModel,
    sampler: Sampler,
    prompts: list[str],
    embeddings: PromptEmbeddings,
    reward: Reward,
    sigmas: list[float],
    batch: int,
) -> Evaluation:
    """Samples one image for each prompt and scores it."""
    device = embeddings.tokens.device
    noise = sampler.latent.noise(len(prompts), generator(_NOISE_SEED, "evaluation", 0), device)
    images = torch.cat(
        [
            decode(sampler.vae, sample_latents(transformer, noise[rows], sigmas, embeddings[rows])).cpu()
            for rows in (slice(start, start + batch) for start in range(0, len(prompts), batch))
        ]
    )
    scores = reward(images, prompts)
    names = [reward.category(prompt) for prompt in prompts]
    categories = {
        name: scores.score[torch.tensor([n == name for n in names])].mean().item() for name in dict.fromkeys(names)
    }
    overall = sum(categories.values()) / len(categories)
    return Evaluation(overall, scores.reward.mean().item(), categories, images)
