"""Using what a run has learnt: evaluation and sampling from its last checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from advflow.core.backends import backends
from advflow.core.device import pick_device
from advflow.core.progress import show_progress
from advflow.core.randomness import generator
from advflow.core.ranks import Ranks
from advflow.data.prompt import Prompt, UnknownPrompt
from advflow.data.prompts import load_eval_prompts
from advflow.models.adapters import read_adapter
from advflow.models.encoding import Encoder
from advflow.models.family import LoadedModel, make_family
from advflow.policies import Policies, make_policies
from advflow.rewards.several import Rewards, load_rewards
from advflow.run.average import AVERAGE
from advflow.run.checkpoint import checkpoint_name, checkpoints, load_checkpoint, load_newest
from advflow.run.drawing import draw_of
from advflow.run.evaluate import Evaluation, evaluate
from advflow.run.log import best_iteration
from advflow.run.run import CHECKPOINTS
from advflow.run.scored_images import ScoredImages
from advflow.run.state import Part, Weights
from advflow.samplers.guidance import guide
from advflow.settings.config import TrainConfig
from advflow.settings.registry import FAMILIES, REWARDS


@dataclass(frozen=True)
class LoadedRun:
    """A run's settings, its model, and its policies at the checkpoint after `iteration`; None is the base."""

    config: TrainConfig
    iteration: int | None
    model: LoadedModel
    policies: Policies
    device: torch.device


def load_run(folder: Path, config: TrainConfig, base: bool, checkpoint: str = "last") -> LoadedRun:
    """Loads the run in `folder` at `checkpoint`, "last", "best" or a number of iterations; with `base`, before any.

    Raises ValueError where it is not there, before a model is loaded.
    """
    chosen = None if base else _chosen(folder, checkpoint)
    device = pick_device(config.device)
    family = make_family(config.model.family, config.section(FAMILIES, config.model.family))
    family.check(config.model)
    start = read_adapter(config.model) if base else None  # a checkpoint holds what has become of it
    model = family.load(config.model, device)
    policies = make_policies(family, model.transformer, config.model, config.runtime, config.seed, start)
    given_away = "learner" if config.evaluation.ema is None else AVERAGE
    parts: dict[str, Part] = {given_away: Weights(policies.learner)}
    iteration = None
    if chosen is not None:
        iteration = load_checkpoint(chosen, parts, only=True)
    elif not base:
        iteration = load_newest(folder / CHECKPOINTS, parts, only=True)
    return LoadedRun(config, iteration, model, policies, device)


def _chosen(folder: Path, checkpoint: str) -> Path | None:
    """The checkpoint that was asked for; None for the newest one."""
    saved = [path.name for path in checkpoints(folder / CHECKPOINTS)]
    if not saved:
        raise ValueError(f"run {str(folder)!r} has no checkpoint yet; --base uses the model before training")
    if checkpoint == "last":
        return None
    number = best_iteration(folder) if checkpoint == "best" else int(checkpoint) if checkpoint.isdecimal() else None
    if number is None or checkpoint_name(number) not in saved:
        raise ValueError(f'--checkpoint is {checkpoint!r}; accepted here: "last", "best" or one of {", ".join(saved)}')
    return folder / CHECKPOINTS / checkpoint_name(number)


@dataclass(frozen=True)
class Judgement:
    """What a policy is evaluated by."""

    prompts: list[Prompt]
    rewards: Rewards


def with_choices(config: TrainConfig, choices: Mapping[str, Any]) -> TrainConfig:
    """The settings of a run with those of `choices` that belong to its evaluation; None leaves one as it is."""
    given = {name: value for name, value in choices.items() if value is not None}
    data: dict[str, Any] = {name: given[name] for name in ("eval_prompts", "reward") if name in given}
    if given.keys() & {"reward", "reward_args"}:
        data["reward_args"] = given.get("reward_args", {})
    evaluation = {name: given[name] for name in ("prompts_per_category", "steps", "guidance") if name in given}
    return replace(config, data=replace(config.data, **data), evaluation=replace(config.evaluation, **evaluation))


def load_judgement(config: TrainConfig) -> Judgement:
    """The held-out prompts and the rewards of a run. Raises ValueError for a prompt that a reward cannot score."""
    data = config.data
    rewards = load_rewards(data, lambda name: config.section(REWARDS, name))
    prompts = load_eval_prompts(data.eval_prompts, config.evaluation.prompts_per_category)
    rewards.expect(prompts)
    for prompt in prompts:
        try:
            rewards.check(prompt)
        except UnknownPrompt as error:
            raise ValueError(f"data.eval_prompts is {data.eval_prompts!r}: {error}") from error
    return Judgement(prompts, rewards)


def evaluate_run(run: LoadedRun, judgement: Judgement, folder: Path | None = None) -> Evaluation:
    """Scores the learner, as training does; every image and its scores go into the new `folder`.

    Raises ValueError where no score is finite.
    """
    config = run.config
    data, prompts, rewards = config.data, judgement.prompts, judgement.rewards
    images = None if folder is None else ScoredImages(folder)
    progress = iter(show_progress(range(-(-len(prompts) // config.rollout.batch)), desc="eval", unit="batch"))
    with backends(config.runtime.attention, config.runtime.tf32):
        # As in training, to the bit: rounding may depend on how many texts are encoded together.
        encode = Encoder(run.model, data.embeddings_cache, run.device, Ranks())
        told, scale = encode([prompt.text for prompt in prompts], "data.eval_prompts"), config.evaluation.guidance
        untold = None if scale == 1 else encode([config.rollout.negative_prompt], "rollout.negative_prompt")[:1]
        result = evaluate(
            draw_of(config, run.policies, run.model.latents, "learner", config.evaluation.steps),
            run.model.latents,
            prompts,
            guide(told, untold, scale),
            rewards,
            config.rollout.batch,
            run.device,
            keep=[0],
            between_batches=lambda: next(progress, None),
            keeper=images.add if images is not None else lambda _: None,
            compare=run.model.real.compare if run.model.real is not None else None,
        )
    next(progress, None)  # the last batch is done too
    if not math.isfinite(result.overall):
        raise ValueError(f"data.reward {config.data.reward!r} gave none of the {len(prompts)} images a finite score")
    if images is not None:
        of: dict[str, Any] = {"random_weights": True} if config.model.random_weights else {}
        of |= {"run": config.out, "iteration": run.iteration, "negative_prompt": config.rollout.negative_prompt}
        images.finish(
            of | {"data": asdict(data), "evaluation": asdict(config.evaluation)}, result, prompts, rewards.names
        )
    return result


def draw_images(
    run: LoadedRun,
    prompt: str,
    count: int,
    steps: int,
    seed: int,
    guidance: float = 1.0,
    negative_prompt: str = "",
) -> torch.Tensor:
    """Draws `count` images of `prompt` from the learner. Returns fp32 [count, 3, H, W] in [0, 1] on the CPU."""
    with backends(run.config.runtime.attention, run.config.runtime.tf32):
        told = run.model.encode([prompt])
        untold = None if guidance == 1 else run.model.encode([negative_prompt])
        conditioning, latents = guide(told, untold, guidance), run.model.latents
        noise = latents.noise(count, generator(seed, "sample", 0), torch.device("cpu"))
        draw = draw_of(run.config, run.policies, latents, "learner", steps)
        images = []
        for part in noise.split(run.config.rollout.batch):
            same = conditioning[torch.zeros(len(part), dtype=torch.int64)]
            images.append(latents.decode(draw(part.to(run.device), same)).cpu())
        return torch.cat(images)
