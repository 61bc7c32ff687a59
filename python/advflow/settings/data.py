"""What is asked, drawn, scored and turned into advantages."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from advflow.settings.numbers import require
from advflow.settings.registry import SAMPLERS
from advflow.settings.rewards import RewardConfig, read_rewards

Solver: TypeAlias = Literal[tuple(SAMPLERS)]  # type: ignore[valid-type]  # names that a checker cannot read

EMBEDDED = "embedded"
"""What stands for the embedded world where a setting names a file or a folder."""

AR_WORLD = "ar_world"
"""What stands for the prompts of the embedded world of autoregressive models where a setting names a file."""

SHAPES = "shapes"
"""What stands for the prompts of `advflow.shapes` where a setting names a file."""

BUILT_IN_PROMPTS = (EMBEDDED, AR_WORLD, SHAPES)


@dataclass
class DataConfig:
    """What is asked of the model and how its answers are scored.

    Args:
        prompts: "embedded" (training prompts of the embedded world), "ar_world" (those of them that its autoregressive
            model knows), "shapes" (those of the shapes rule), a text file with one prompt a line, or a .jsonl file with
            one object a line, as GenEval's: its "prompt", its "tag" as category, all else for the reward.
        eval_prompts: "embedded", "ar_world" or "shapes" (their held-out prompts), or such a file.
        reward: a built-in one (docs/rewards.md lists them), a plugin's, or a dotted path "package.module:Class". Or
            several, a mapping of names to weights, or to mappings of weight, batch, args and reward, such as
            {pickscore: 1.0, text: {reward: ocr, weight: 0.5}}; `advantage.combine` says what becomes of them.
        reward_args: what the class of a reward that stands alone is made with, each as `--data.reward_args.NAME VALUE`;
            a plugin's may have a section of its own instead.
        embeddings_cache: folder that keeps what the text encoders say of each prompt, for this run and others; null:
            in memory for up to 2,048 prompts, for more in advflow/embeddings below $XDG_CACHE_HOME or ~/.cache.
    """

    prompts: str = "embedded"
    eval_prompts: str = "embedded"
    reward: str | dict[str, Any] = "embedded"
    reward_args: dict[str, Any] = field(default_factory=dict)
    embeddings_cache: str | None = None

    def __post_init__(self) -> None:
        read_rewards(self.reward, self.reward_args)

    @property
    def rewards(self) -> dict[str, RewardConfig]:
        """The rewards by name."""
        return read_rewards(self.reward, self.reward_args)


@dataclass
class RolloutConfig:
    """How images are drawn.

    Args:
        prompts: prompts per iteration (L of the paper).
        images_per_prompt: images per prompt, one group (K of the paper).
        steps: steps from noise to image.
        batch: images sampled at a time.
        solver: of the ODE: "euler", or "dpm" for second-order multistep DPM-Solver++; see advflow.samplers.
            Reverse-process methods use the sampler of `sde` instead.
        policy: who draws them: the "rollout" policy, or the "learner" itself (AWM).
        guidance: scale of classifier-free guidance, 1 being none; with another every step takes two passes. Methods of
            the reverse process learn from the velocities that drew the images, and so with the same guidance.
        negative_prompt: what guidance leads away from, here, in training and in evaluation.
    """

    prompts: int = 16
    images_per_prompt: int = 8
    steps: int = 10
    batch: int = 128
    solver: Solver = "euler"
    policy: Literal["rollout", "learner"] = "rollout"
    guidance: float = 1.0
    negative_prompt: str = ""

    def __post_init__(self) -> None:
        require(self.prompts >= 1, "rollout.prompts", self.prompts, "1 or more")
        require(self.images_per_prompt >= 2, "rollout.images_per_prompt", self.images_per_prompt, "2 or more")
        require(self.steps >= 1, "rollout.steps", self.steps, "1 or more")
        require(self.batch >= 1, "rollout.batch", self.batch, "1 or more")
        require(self.guidance >= 0, "rollout.guidance", self.guidance, "zero or a positive number")

    @property
    def images(self) -> int:
        """Images drawn in an iteration."""
        return self.prompts * self.images_per_prompt


@dataclass
class AdvantageConfig:
    """How rewards become advantages; the arguments of `advflow_ext.group_advantages`.

    Args:
        norm: "batch_rms" (the paper's eq. 6), "group_std", "raw_global_std" (DiffusionNFT's code), or "softmax"
            (FlowAWR; `advflow_ext.softmax_advantages`).
        clip: bound of an advantage, in units of the norm; of the normalised rewards before the softmax (5 in FlowAWR's
            code, which bounds what comes after it at 3).
        clip_mode: "clip" (the paper), "recentre", "scale" or "clip_divide" (DiffusionNFT's code: +-5, then / 5).
            "softmax" knows "clip" alone.
        scale_by_std: of "softmax" alone: FlowAWR's gate for rule-based rewards, on for its GenEval and OCR.
        combine: several rewards become one before that: "weighted_sum" of themselves (flow_grpo), or of what is left
            of each over its group's mean in its group's standard deviations ("gdpo", arXiv 2601.05242), or the smallest
            of these, each times its weight ("worst_first"). With capability.candidates the first alone.
    """

    norm: Literal["batch_rms", "group_std", "raw_global_std", "softmax"] = "batch_rms"
    clip: float = 5.0
    clip_mode: Literal["clip", "recentre", "scale", "clip_divide"] = "clip_divide"
    scale_by_std: bool = False
    combine: Literal["weighted_sum", "gdpo", "worst_first"] = "weighted_sum"

    def __post_init__(self) -> None:
        require(self.clip > 0, "advantage.clip", self.clip, "a positive number")
        gated = self.scale_by_std and self.norm != "softmax"
        require(not gated, "advantage.scale_by_std", self.scale_by_std, "False, or advantage.norm softmax")


@dataclass
class EvalConfig:
    """Evaluation of the learner on held-out prompts, before the first iteration, along the way and at the end.

    Args:
        every: iterations between two evaluations.
        steps: Euler steps.
        prompts_per_category: evaluation prompts of each category: of the embedded world, or, with a file of prompts, of
            each that they have (the first ones).
        guidance: scale of classifier-free guidance, away from rollout.negative_prompt; 1 is none.
        ema: decay, an optimiser step, of a moving average of the learner's weights (flow_grpo: 0.9 every eighth step).
            It is evaluated, sampled from and exported in the learner's place; null: the learner itself is.
    """

    every: int = 20
    steps: int = 10
    prompts_per_category: int = 64
    guidance: float = 1.0
    ema: float | None = None

    def __post_init__(self) -> None:
        require(self.every >= 1, "evaluation.every", self.every, "1 or more")
        require(self.steps >= 1, "evaluation.steps", self.steps, "1 or more")
        require(self.prompts_per_category >= 1, "evaluation.prompts_per_category", self.prompts_per_category, ">= 1")
        require(self.guidance >= 0, "evaluation.guidance", self.guidance, "zero or a positive number")
        require(self.ema is None or 0 < self.ema < 1, "evaluation.ema", self.ema, "null, or a number in (0, 1)")
