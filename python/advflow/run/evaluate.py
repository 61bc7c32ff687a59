"""Scoring a policy on held-out prompts, always from the same noise."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from advflow.core.randomness import generator
from advflow.core.ranks import Ranks, batches, longest
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
    ranks: Ranks | None = None,
) -> Evaluation:
    """Samples one image for each prompt and scores it, `batch` at a time.

    Of the images only those number `keep` are returned, in that order; None: all. `between_batches` may end the
    evaluation by raising. Each of `ranks` draws and scores its share; all are returned the whole.
    """
    ranks = ranks or Ranks()
    noise = latents.noise(len(prompts), generator(_NOISE_SEED, "evaluation", 0), torch.device("cpu"))
    keep = list(range(len(prompts))) if keep is None else keep
    kept: list[int] = []
    images, rewards, scores = [], [], []
    own = ranks.share(len(prompts))
    most = longest(ranks.in_step(len(prompts)))
    for within, used in batches(own.stop - own.start, batch, most):
        between_batches()
        rows = range(own.start + within.start, own.start + within.stop)
        part = slice(rows.start, rows.stop)
        x0 = sample_latents(velocity, noise[part].to(device), sigmas, conditioning[part], Euler())
        if not used:
            continue
        drawn = latents.decode(x0).cpu()
        result = reward(drawn, prompts[part])
        rewards.append(result.reward)
        scores.append(result.score)
        wanted = [row for row in rows if row in keep]
        kept += wanted
        images.append(drawn[[row - rows.start for row in wanted]])
    score, reward_of = ranks.gather(torch.cat(scores)), ranks.gather(torch.cat(rewards))
    names = [prompt.category for prompt in prompts]
    categories = {name: finite_mean(score[[n == name for n in names]]) for name in dict.fromkeys(names)}
    scored = [value for value in categories.values() if math.isfinite(value)]
    overall = sum(scored) / len(scored) if scored else math.nan
    unscored = int((~score.isfinite()).sum())
    of_rows = [row for rows in ranks.everyone(kept) for row in rows]
    in_order = ranks.gather(torch.cat(images))[[of_rows.index(row) for row in keep]]
    return Evaluation(overall, finite_mean(reward_of), categories, in_order, unscored)


def finite_mean(values: torch.Tensor) -> float:
    """The mean of what is finite in `values`; NaN where nothing is."""
    return values[values.isfinite()].mean().item()
