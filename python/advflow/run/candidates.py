"""One deterministic image for each candidate prompt, and what it scores."""

from __future__ import annotations

from collections.abc import Callable

import torch

from advflow.core.ranks import Ranks, batches, longest
from advflow.data.prompt import Prompt
from advflow.models.family import Images
from advflow.rewards.several import Rewards
from advflow.run.drawing import Draw
from advflow.run.scoring import Scoring
from advflow.samplers.sampling import Conditioning


def score_candidates(
    draw: Draw,
    latents: Images,
    prompts: list[Prompt],
    conditioning: Conditioning,
    noise: torch.Tensor,
    rewards: Rewards,
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
            x0 = draw(noise[rows], conditioning[within])
            if not used:
                continue
            broken.append(~x0.flatten(1).isfinite().all(1).cpu())
            scoring.add(latents.decode(x0))
        totals = rewards.total(scoring.scores().reward)
    return ranks.gather(totals.masked_fill(torch.cat(broken), torch.nan))
