"""Scoring a policy on held-out prompts, always from the same noise."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from advflow.core.randomness import generator
from advflow.core.ranks import Ranks, batches, longest
from advflow.data.prompt import Prompt
from advflow.models.family import Comparison, Images
from advflow.rewards import Scores
from advflow.rewards.several import Rewards
from advflow.run.drawing import Draw
from advflow.run.scoring import Scoring
from advflow.samplers.sampling import Conditioning

_NOISE_SEED = 0  # of no run: every run, whatever its seed, is judged on the same noise


@dataclass(frozen=True)
class HeldOut:
    """`overall` is the mean over categories of the mean score.

    Means are over finite numbers, and NaN where there are none; `unscored` images got a score that is not finite.
    """

    overall: float
    reward: float
    categories: dict[str, float]
    unscored: int


@dataclass(frozen=True)
class Evaluation:
    """The same of the rewards' weighted sum, and of `each` by its name where there are several.

    `images` [N, 3, H, W] are what was scored, `scores` [N, R] what every image got, of those that were not kept too.
    `distribution` are the numbers of all images together, where they are compared with real ones.
    """

    overall: float
    reward: float
    categories: dict[str, float]
    images: torch.Tensor
    unscored: int = 0
    each: dict[str, HeldOut] = field(default_factory=dict)
    scores: Scores | None = None
    distribution: dict[str, float] = field(default_factory=dict)


def evaluate(
    draw: Draw,
    latents: Images,
    prompts: list[Prompt],
    conditioning: Conditioning,
    rewards: Rewards,
    batch: int,
    device: torch.device,
    keep: list[int] | None = None,
    between_batches: Callable[[], None] = lambda: None,
    ranks: Ranks | None = None,
    check_stop: Callable[[], None] = lambda: None,
    keeper: Callable[[torch.Tensor], None] = lambda _: None,
    compare: Comparison | None = None,
) -> Evaluation:
    """Samples one image for each prompt and scores it, `batch` at a time.

    Of the images only those number `keep` are returned, in that order; None: all. `between_batches` may end the
    evaluation by raising, and `check_stop` where scores are waited for. Each of `ranks` draws and scores its share; all
    are returned the whole. `keeper` is given each batch of this process as it comes, `compare` all
    images together.
    """
    ranks = ranks or Ranks()
    noise = latents.noise(len(prompts), generator(_NOISE_SEED, "evaluation", 0), torch.device("cpu"))
    keep = list(range(len(prompts))) if keep is None else keep
    shown = keep
    if compare is not None:
        keep = list(range(len(prompts)))
    kept: list[int] = []
    images = []
    own = ranks.share(len(prompts))
    most = longest(ranks.in_step(len(prompts)))
    with Scoring(rewards, prompts[own], check_stop, ranks) as scoring:
        for within, used in batches(own.stop - own.start, batch, most):
            between_batches()
            rows = range(own.start + within.start, own.start + within.stop)
            part = slice(rows.start, rows.stop)
            x0 = draw(noise[part].to(device), conditioning[part])
            if not used:
                continue
            drawn = latents.decode(x0).cpu()
            keeper(drawn)
            scoring.add(drawn)
            wanted = [row for row in rows if row in keep]
            kept += wanted
            images.append(drawn[[row - rows.start for row in wanted]])
        scores = scoring.scores()
    score, reward = ranks.gather(scores.score), ranks.gather(scores.reward)
    of_rows = [row for rows in ranks.everyone(kept) for row in rows]
    in_order = ranks.gather(torch.cat(images))[[of_rows.index(row) for row in keep]]
    categories = [prompt.category for prompt in prompts]
    whole = _summary(rewards.total(reward), rewards.total(score), categories)
    columns = zip(rewards.names, reward.unbind(1), score.unbind(1), strict=True)
    each = {name: _summary(its_reward, its_score, categories) for name, its_reward, its_score in columns}
    return Evaluation(
        whole.overall,
        whole.reward,
        whole.categories,
        in_order if compare is None else in_order[shown],
        whole.unscored,
        each if len(each) > 1 else {},
        Scores(reward, score),
        {} if compare is None else compare(in_order, prompts),
    )


def _summary(reward: torch.Tensor, score: torch.Tensor, names: list[str]) -> HeldOut:
    """Of one number an image, [N], each in the category of its name."""
    categories = {name: finite_mean(score[[n == name for n in names]]) for name in dict.fromkeys(names)}
    scored = [value for value in categories.values() if math.isfinite(value)]
    overall = sum(scored) / len(scored) if scored else math.nan
    return HeldOut(overall, finite_mean(reward), categories, int((~score.isfinite()).sum()))


def finite_mean(values: torch.Tensor) -> float:
    """The mean of what is finite in `values`; NaN where nothing is."""
    return values[values.isfinite()].mean().item()
