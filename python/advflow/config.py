"""The settings of a run. Every field can be set in YAML and overridden on the command line by its dotted name."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

_LORA_TARGETS = (
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
)


def _require(condition: bool, name: str, value: object, accepted: str) -> None:
    if not condition:
        raise ValueError(f"{name} is {value!r}; accepted: {accepted}")


@dataclass
class ModelConfig:
    """Which pipeline is post-trained and which of its weights learn.

    Args:
        pipeline: folder or hub name of a StableDiffusion3Pipeline; "embedded" is the tiny one inside this package.
        trainable: "full" trains every transformer weight, "lora" trains adapters on a frozen base.
        lora_rank: rank of the adapters.
        lora_alpha: scale of the adapters; their output is multiplied by alpha / rank.
        lora_targets: module names that get an adapter.
        dtype: precision of the frozen weights and of the forward passes; what is trained is always fp32.
        resolution: side of the square images in pixels.
        max_sequence_length: T5 tokens a prompt is padded or cut to.
        gradient_checkpointing: recompute activations in the backward pass to save memory.
    """

    pipeline: str = "embedded"
    trainable: Literal["full", "lora"] = "full"
    lora_rank: int = 32
    lora_alpha: int = 64
    lora_targets: list[str] = field(default_factory=lambda: list(_LORA_TARGETS))
    dtype: Literal["float32", "bfloat16"] = "float32"
    resolution: int = 32
    max_sequence_length: int = 12
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        _require(self.lora_rank >= 1, "model.lora_rank", self.lora_rank, "1 or more")
        _require(self.resolution >= 8, "model.resolution", self.resolution, "8 or more pixels")
        _require(self.max_sequence_length >= 1, "model.max_sequence_length", self.max_sequence_length, "1 or more")


@dataclass
class DataConfig:
    """What is asked of the model and how its answers are scored.

    Args:
        prompts: "embedded" (training prompts of the embedded world) or a text file with one prompt a line.
        eval_prompts: "embedded" (its held-out prompts) or a text file with one prompt a line.
        reward: "embedded", "pickscore", or a dotted path "package.module:Class"; see advflow.rewards.
    """

    prompts: str = "embedded"
    eval_prompts: str = "embedded"
    reward: str = "embedded"


@dataclass
class RolloutConfig:
    """How images are drawn from the rollout policy: deterministic ODE, no classifier-free guidance.

    Args:
        prompts: prompts per iteration (L of the paper).
        images_per_prompt: images per prompt, one group (K of the paper).
        steps: Euler steps from noise to image.
        batch: images sampled at a time.
    """

    prompts: int = 16
    images_per_prompt: int = 8
    steps: int = 10
    batch: int = 128

    def __post_init__(self) -> None:
        _require(self.prompts >= 1, "rollout.prompts", self.prompts, "1 or more")
        _require(self.images_per_prompt >= 2, "rollout.images_per_prompt", self.images_per_prompt, "2 or more")
        _require(self.steps >= 1, "rollout.steps", self.steps, "1 or more")
        _require(self.batch >= 1, "rollout.batch", self.batch, "1 or more")


@dataclass
class AdvantageConfig:
    """How rewards become advantages; the arguments of `advflow_ext.group_advantages`.

    Args:
        norm: "batch_rms" (the paper's eq. 6), "group_std" or "raw_global_std" (DiffusionNFT's code).
        clip: bound of an advantage, in units of the norm.
        clip_mode: "clip" (the paper), "recentre", "scale" or "clip_divide" (DiffusionNFT's code: +-5, then / 5).
    """

    norm: Literal["batch_rms", "group_std", "raw_global_std"] = "batch_rms"
    clip: float = 5.0
    clip_mode: Literal["clip", "recentre", "scale", "clip_divide"] = "clip_divide"

    def __post_init__(self) -> None:
        _require(self.clip > 0, "advantage.clip", self.clip, "a positive number")


@dataclass
class LossConfig:
    """The coefficients of the AdvantageFlow loss; see `advflow_ext.advantage_flow_loss`.

    Args:
        gamma: rollout regularisation, a number or "1-A".
        lam: reference regularisation.
        weighting: "prediction" (t^2), "velocity" (1) or "adaptive" (t^2 over the detached prediction error).
    """

    gamma: float | Literal["1-A"] = 1.1
    lam: float = 1e-3
    weighting: Literal["prediction", "velocity", "adaptive"] = "prediction"

    def __post_init__(self) -> None:
        _require(self.gamma == "1-A" or self.gamma >= 0, "loss.gamma", self.gamma, 'zero, a positive number or "1-A"')
        _require(self.lam >= 0, "loss.lam", self.lam, "zero or a positive number")


@dataclass
class DrawConfig:
    """How (t, noise) pairs of the forward process are drawn for the images of a rollout.

    Args:
        per_image: pairs drawn for each image.
        noise: "per_image" (fresh for every image) or "shared_in_group" (all images of a prompt get the same pairs,
            so that what their advantages, which sum to zero, have in common cancels).
        timesteps: "uniform", "stratified" (one in each of `per_image` equal parts of (0, 1]) or "sampler_grid" (a
            random choice of the rollout's own timesteps, as in DiffusionNFT's code).
    """

    per_image: int = 4
    noise: Literal["per_image", "shared_in_group"] = "shared_in_group"
    timesteps: Literal["uniform", "stratified", "sampler_grid"] = "stratified"

    def __post_init__(self) -> None:
        _require(self.per_image >= 1, "draws.per_image", self.per_image, "1 or more")


@dataclass
class OptimConfig:
    """AdamW and the batches it sees.

    Args:
        lr: learning rate.
        warmup: optimiser steps over which the learning rate rises linearly from 0. AdamW's first steps move every
            weight by the learning rate however small its gradient, which a pretrained model remembers.
        decay: "linear" lets the learning rate fall to 0 over the run, "none" keeps it.
        betas: decay rates of AdamW's two moments.
        eps: AdamW's denominator constant.
        weight_decay: decoupled weight decay.
        max_grad_norm: gradients are scaled down to this norm.
        steps_per_iteration: optimiser steps made of one rollout; each takes an equal share of the draws.
        micro_batch: samples in one forward and backward pass; gradients accumulate over a step.
    """

    lr: float = 2e-4
    warmup: int = 10
    decay: Literal["none", "linear"] = "linear"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-4
    max_grad_norm: float = 1.0
    steps_per_iteration: int = 1
    micro_batch: int = 128

    def __post_init__(self) -> None:
        _require(self.lr > 0, "optim.lr", self.lr, "a positive number")
        _require(self.warmup >= 0, "optim.warmup", self.warmup, "zero or more steps")
        _require(self.max_grad_norm > 0, "optim.max_grad_norm", self.max_grad_norm, "a positive number")
        _require(self.steps_per_iteration >= 1, "optim.steps_per_iteration", self.steps_per_iteration, "1 or more")
        _require(self.micro_batch >= 1, "optim.micro_batch", self.micro_batch, "1 or more")


@dataclass
class RolloutPolicyConfig:
    """How the rollout policy follows the learner: theta_old <- rho theta_old + (1 - rho) theta after each iteration.

    rho = min(max(rate * (step - start), 0), maximum), step counting optimiser steps. DiffusionNFT's code has
    (rate, start, maximum) = (0.001, 0, 0.5) by default and (0.0075, 75, 0.999) for OCR; rate 0 copies the learner.

    Args:
        rate: growth of rho per optimiser step.
        start: optimiser step at which rho starts to grow.
        maximum: upper bound of rho.
    """

    rate: float = 0.01
    start: int = 0
    maximum: float = 0.5

    def __post_init__(self) -> None:
        _require(self.rate >= 0, "rollout_policy.rate", self.rate, "zero or a positive number")
        _require(0 <= self.maximum < 1, "rollout_policy.maximum", self.maximum, "a number in [0, 1)")


@dataclass
class EvalConfig:
    """Evaluation of the learner on held-out prompts, before the first iteration, along the way and at the end.

    Args:
        every: iterations between two evaluations.
        steps: Euler steps.
        prompts_per_category: evaluation prompts of each category of the embedded world.
    """

    every: int = 20
    steps: int = 10
    prompts_per_category: int = 64

    def __post_init__(self) -> None:
        _require(self.every >= 1, "evaluation.every", self.every, "1 or more")
        _require(self.steps >= 1, "evaluation.steps", self.steps, "1 or more")
        _require(self.prompts_per_category >= 1, "evaluation.prompts_per_category", self.prompts_per_category, ">= 1")


@dataclass
class TrainConfig:
    """Everything `advflow train` needs. The defaults post-train the embedded world.

    Args:
        algorithm: which policy-improvement method.
        iterations: rollout-and-update rounds.
        seed: seed of all randomness of the run.
        out: folder of the run.
        checkpoint_every: iterations between two checkpoints.
        device: "auto" is cuda where there is one, else cpu.
    """

    algorithm: Literal["advantage_flow"] = "advantage_flow"
    iterations: int = 180
    seed: int = 0
    out: str = "runs/tiny"
    checkpoint_every: int = 20
    device: str = "auto"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    draws: DrawConfig = field(default_factory=DrawConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    rollout_policy: RolloutPolicyConfig = field(default_factory=RolloutPolicyConfig)
    evaluation: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        _require(self.iterations >= 1, "iterations", self.iterations, "1 or more")
        _require(self.checkpoint_every >= 1, "checkpoint_every", self.checkpoint_every, "1 or more")
        share, rest = divmod(self.draws.per_image, self.optim.steps_per_iteration)
        _require(
            share >= 1 and rest == 0,
            "optim.steps_per_iteration",
            self.optim.steps_per_iteration,
            f"a divisor of draws.per_image, which is {self.draws.per_image}",
        )
