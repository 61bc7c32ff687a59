"""One deterministic image for each candidate prompt, and what it scores."""

from __future__ import annotations

from collections.abc import Callable

import torch

from advflow.core.ranks import Ranks, batches, longest
from advflow.data.prompt import Prompt
from advflow.models.family import Latents
from advflow.rewards.several import Rewards
from advflow.run.scoring import Scoring
from advflow.samplers.sampling import Conditioning, Sampler, Velocity, sample_latents


def score_candidates(
    velocity: Velocity,
    latents: Latents,
    prompts: list[Prompt],
    conditioning: Conditioning,
    noise: torch.Tensor,
    rewards: Rewards,
    sigmas: list[float],
    sampler: Sampler,
    batch: int,
    between_batches: Callable[[], None],
    ranks: Ranks,
    check_stop: Callable[[], None],
) -> torch.Tensor:
    """The weighted rewards [N] of the images that `prompts` get from `noise` [N, ...]; NaN where one has none.

    Each of `ranks` draws and scores its share, of which alone `conditioning` is; all are returned the whole.
    """
    own = ranks.share(len(prompts))
    broken = []
    most = longest(ranks.in_step(len(prompts)))
    with Scoring(rewards, prompts[own], check_stop, ranks) as scoring:
        for within, used in batches(own.stop - own.start, batch, most):
            between_batches()
            rows = slice(own.start + within.start, own.start + within.stop)
            x0 = sample_latents(velocity, noise[rows], sigmas, conditioning[within], sampler)
            if not used:
                continue
            broken.append(~x0.flatten(1).isfinite().all(1).cpu())
            scoring.add(latents.decode(x0))
        totals = rewards.total(scoring.scores().reward)
    return ranks.gather(totals.masked_fill(torch.cat(broken), torch.nan))
