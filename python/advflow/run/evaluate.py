"""Scoring a policy on held-out prompts, always from the same noise."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from advflow.core.randomness import generator
from advflow.data.prompt import Prompt
from advflow.models.family import Latents
from advflow.rewards import Reward
from advflow.samplers.euler import Euler
from advflow.samplers.sampling import Conditioning, Velocity, sample_latents

_NOISE_SEED = 0  # of no run: every run, whatever its seed, is judged on the same noise


@dataclass(frozen=True)
class Evaluation:
    """`overall` is the mean over categories of the mean score; `images` [N, 3, H, W] are what was scored.

    Means are over finite numbers, and NaN where there are none; `unscored` images got a score that is not finite.
    """

    overall: float
    reward: float
    categories: dict[str, float]
    images: torch.Tensor
    unscored: int = 0


def evaluate(
    velocity: Velocity,
    latents: Latents,
    prompts: list[Prompt],
    conditioning: Conditioning,
    reward: Reward,
    sigmas: list[float],
    batch: int,
    device: torch.device,
    keep: list[int] | None = None,
    between_batches: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Samples one image for each prompt and scores it, `batch` at a time.

    Of the images only those number `keep` are returned, in that order; None: all. `between_batches` may end the
    evaluation by raising.
    """
    noise = latents.noise(len(prompts), generator(_NOISE_SEED, "evaluation", 0), torch.device("cpu"))
    keep = list(range(len(prompts))) if keep is None else keep
    images: dict[int, torch.Tensor] = {}
    rewards, scores = [], []
    for start in range(0, len(prompts), batch):
        between_batches()
        rows = range(start, min(start + batch, len(prompts)))
        part = slice(rows.start, rows.stop)
        x0 = sample_latents(velocity, noise[part].to(device), sigmas, conditioning[part], Euler())
        drawn = latents.decode(x0).cpu()
        result = reward(drawn, prompts[part])
        rewards.append(result.reward)
        scores.append(result.score)
        images |= {row: image for row, image in zip(rows, drawn, strict=True) if row in keep}
    score = torch.cat(scores)
    names = [prompt.category for prompt in prompts]
    categories = {name: finite_mean(score[[n == name for n in names]]) for name in dict.fromkeys(names)}
    scored = [value for value in categories.values() if math.isfinite(value)]
    overall = sum(scored) / len(scored) if scored else math.nan
    unscored = int((~score.isfinite()).sum())
    kept = torch.stack([images[row] for row in keep])
    return Evaluation(overall, finite_mean(torch.cat(rewards)), categories, kept, unscored)


def finite_mean(values: torch.Tensor) -> float:
    """The mean of what is finite in `values`; NaN where nothing is."""
    return values[values.isfinite()].mean().item()
