"""The settings of a run. Every field can be set in YAML and overridden on the command line by its dotted name."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

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


_LARGEST = {float: 3.4028234e38, int: 2**63 - 1}  # what fp32 and a 64-bit integer hold


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, keys joined by dots; tuples become lists, as they do in YAML."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat


def require_numbers(config: object, prefix: str = "") -> None:
    """Refuses a number that its field's type does not hold, in `config` and the dataclasses in it.

    That is a bool, a fraction where an integer belongs, NaN, an infinity, and what fp32 or 64 bits cannot hold. Which
    of the others are accepted is said by each class.
    """
    for name, value, types in _leaves(config, prefix):
        if isinstance(value, str) or value is None:
            continue
        kind = float if float in types else int
        fits = isinstance(value, int | kind) and not isinstance(value, bool) and abs(value) <= _LARGEST[kind]
        accepted = f"an integer of at most {2**63 - 1}" if kind is int else "a finite number of at most 3.4e38"
        _require(fits, name, value, accepted)


def _leaves(config: object, prefix: str) -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    """(dotted name, value, accepted types) of every setting that may be a number."""
    hints = get_type_hints(type(config))
    for each in fields(config):  # type: ignore[arg-type]
        name, value, hint = prefix + each.name, getattr(config, each.name), hints[each.name]
        if is_dataclass(value):
            yield from _leaves(value, f"{name}.")
            continue
        types = (hint,) if isinstance(hint, type) and get_origin(hint) is None else get_args(hint)
        if bool not in types and {int, float} & set(types):
            values = value if get_origin(hint) is tuple else [value]
            yield from ((name, number, types) for number in values)


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
        _require(self.lora_alpha >= 1, "model.lora_alpha", self.lora_alpha, "1 or more")
        _require(self.resolution >= 8, "model.resolution", self.resolution, "8 or more pixels")
        _require(self.max_sequence_length >= 1, "model.max_sequence_length", self.max_sequence_length, "1 or more")


@dataclass
class DataConfig:
    """What is asked of the model and how its answers are scored.

    Args:
        prompts: "embedded" (training prompts of the embedded world) or a text file with one prompt a line.
        eval_prompts: "embedded" (its held-out prompts) or a text file with one prompt a line.
        reward: "embedded", "pickscore", or a dotted path "package.module:Class"; see advflow.rewards.
        reward_args: what the reward's class is made with, each as `--data.reward_args.NAME VALUE`.
    """

    prompts: str = "embedded"
    eval_prompts: str = "embedded"
    reward: str = "embedded"
    reward_args: dict[str, Any] = field(default_factory=dict)


@dataclass
class RolloutConfig:
    """How images are drawn, without classifier-free guidance.

    Args:
        prompts: prompts per iteration (L of the paper).
        images_per_prompt: images per prompt, one group (K of the paper).
        steps: steps from noise to image.
        batch: images sampled at a time.
        solver: of the ODE: "euler", or "dpm" for second-order multistep DPM-Solver++. Reverse-process methods use the
            sampler of `sde` instead.
        policy: who draws them: the "rollout" policy, or the "learner" itself (AWM).
    """

    prompts: int = 16
    images_per_prompt: int = 8
    steps: int = 10
    batch: int = 128
    solver: Literal["euler", "dpm"] = "euler"
    policy: Literal["rollout", "learner"] = "rollout"

    def __post_init__(self) -> None:
        _require(self.prompts >= 1, "rollout.prompts", self.prompts, "1 or more")
        _require(self.images_per_prompt >= 2, "rollout.images_per_prompt", self.images_per_prompt, "2 or more")
        _require(self.steps >= 1, "rollout.steps", self.steps, "1 or more")
        _require(self.batch >= 1, "rollout.batch", self.batch, "1 or more")


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
    """

    norm: Literal["batch_rms", "group_std", "raw_global_std", "softmax"] = "batch_rms"
    clip: float = 5.0
    clip_mode: Literal["clip", "recentre", "scale", "clip_divide"] = "clip_divide"
    scale_by_std: bool = False

    def __post_init__(self) -> None:
        _require(self.clip > 0, "advantage.clip", self.clip, "a positive number")
        gated = self.scale_by_std and self.norm != "softmax"
        _require(not gated, "advantage.scale_by_std", self.scale_by_std, "False, or advantage.norm softmax")


@dataclass
class AdvantageFlowConfig:
    """AdvantageFlow; see `advflow_ext.advantage_flow_loss`.

    Args:
        gamma: rollout regularisation, a number, "1-A" or "beta(beta-A)".
        lam: reference regularisation; 1e-3 in the paper.
        weighting: "prediction" (t^2), "velocity" (1) or "adaptive" (t^2 over the detached prediction error).
        beta: weight of the data term.
        offset: added to every advantage. Advantages of a group sum to zero, so that nothing in the loss asks the
            velocity to be the mean of u on the policy's own images, as flow matching does; an offset above 0 does, with
            itself as the weight. The paper has none.
    """

    gamma: float | Literal["1-A", "beta(beta-A)"] = 1.1
    lam: float = 1e-2
    weighting: Literal["prediction", "velocity", "adaptive"] = "prediction"
    beta: float = 1.0
    offset: float = 0.0

    def __post_init__(self) -> None:
        # The op takes any number, which one a sample may be below 0; one for all samples drives the policy away.
        _require(
            isinstance(self.gamma, str) or self.gamma >= 0,
            "advantage_flow.gamma",
            self.gamma,
            'zero, a positive number, "1-A" or "beta(beta-A)"',
        )
        _require(self.offset >= 0, "advantage_flow.offset", self.offset, "zero or a positive number")


@dataclass
class DiffusionNFTConfig:
    """DiffusionNFT; see `advflow_ext.diffusion_nft_loss`.

    Args:
        beta: how far the implicit positive and negative policies stand from the rollout policy.
        adv_clip_max: advantages are clipped to this.
        kl_weight: reference regularisation, in velocity space.
        adaptive: divide each branch by its detached prediction error.
        mode: which advantages are used.
    """

    beta: float = 1.0
    adv_clip_max: float = 5.0
    kl_weight: float = 1e-4
    adaptive: bool = True
    mode: Literal["all", "positive", "negative", "one", "binary"] = "all"


@dataclass
class AWMConfig:
    """Advantage-weighted matching; see `advflow_ext.awm_loss`. The rollout policy is its EMA anchor.

    Args:
        weighting: how the matching error becomes a log-probability.
        power: exponent of "ghuber".
        ema_weight: pull towards the EMA policy.
        kl_weight: pull towards the reference.
    """

    weighting: Literal["uniform", "t", "t2", "huber", "ghuber"] = "ghuber"
    power: float = 0.25
    ema_weight: float = 1.0
    kl_weight: float = 1e-3


@dataclass
class FlowAWRConfig:
    """FlowAWR; see `advflow_ext.flow_awr_loss`.

    Args:
        kl_weight: pull towards the reference, in velocity space; 1e-4 in its code.
        weighting: "adaptive" (t^2 over the detached prediction error: its code), "prediction" (t^2) or "velocity" (1).
    """

    kl_weight: float = 1e-4
    weighting: Literal["adaptive", "prediction", "velocity"] = "adaptive"


@dataclass
class RewardWeightedConfig:
    """Reward-weighted flow matching; see `advflow_ext.reward_weighted_loss`.

    Args:
        method: weight exp(tau R) (ORW-CFM-W2), R itself (RWR), or 1 for the best of a group and else 0 (RAFT).
        tau: inverse temperature of "exp".
        kl_weight: pull towards the reference.
    """

    method: Literal["exp", "linear", "best"] = "exp"
    tau: float = 0.5
    kl_weight: float = 1.0


@dataclass
class FlowGRPOConfig:
    """Flow-GRPO, and DanceGRPO and MixGRPO, which differ in the sampler; see `advflow_ext.flow_grpo_loss`.

    Args:
        clip: the mean-reduced ratio is clipped to 1 +- this.
        kl_weight: weight of the KL divergence to the reference.
        kl_convention: which public trainer's KL divergence.
    """

    clip: float = 1e-4
    kl_weight: float = 0.0
    kl_convention: Literal["exact", "dt", "two_sigma_squared"] = "exact"


@dataclass
class GRPOGuardConfig:
    """GRPO-Guard; see `advflow_ext.grpo_guard_loss`.

    Args:
        clip: the normalised ratio is clipped to 1 +- this.
        kl_weight: weight of the KL divergence to the reference.
        time_weight: "inverse_dt" divides a step's loss by its length, "none" does not.
    """

    clip: float = 2e-6
    kl_weight: float = 0.0
    time_weight: Literal["inverse_dt", "none"] = "inverse_dt"


@dataclass
class FlowCPSConfig:
    """Flow-CPS; see `advflow_ext.flow_cps_loss`.

    Args:
        clip: the ratio, without its variance, is clipped to 1 +- this.
        kl_weight: weight of the KL divergence to the reference.
    """

    clip: float = 1e-4
    kl_weight: float = 0.0


@dataclass
class FlowDPPOConfig:
    """Flow-DPPO; see `advflow_ext.flow_dppo_loss`.

    Args:
        threshold: mean-reduced KL divergence from which an outward step is masked.
        direction: what tells outward from corrective.
        mask: threshold the divergence as it is, or as it would be after the step.
        step_size: size of that step, for mask "predictive".
        kl_weight: weight of the KL divergence to the reference.
    """

    threshold: float = 1e-6
    direction: Literal["ratio", "log_ratio_minus_kl"] = "ratio"
    mask: Literal["current", "predictive"] = "current"
    step_size: float | None = None
    kl_weight: float = 0.0


@dataclass
class SDEConfig:
    """The stochastic sampler of the reverse-process methods, and which of its steps are learnt from.

    Args:
        sampler: "flow_sde" (Flow-GRPO), "dance_sde" (DanceGRPO) or "cps" (Flow-CPS).
        noise_level: a of Flow-SDE, eta of the other two.
        window: which steps are stochastic, the others being Euler steps of the ODE: the "first" `steps`, `steps`
            drawn at "random" or in a "random_window" from the first `within`, a window "sliding" from the noisy end to
            the clean one and over again (MixGRPO), or a "branch" (Flow-GRPO-Fast): one trajectory a group up to a
            random window within the first `within` steps, where its images part.
        steps: stochastic steps.
        within: the steps that "random", "random_window" and "branch" choose from; null is the first half.
        shift_every: iterations after which a sliding window moves on by one step.
        shared_noise: all images of a group start from the same noise (DanceGRPO).
        trained_share: share of an image's stochastic steps that are learnt from, drawn anew for each image.
        anchor: "stored" keeps the rollout's own velocities as v_old; "replay" computes them again in the batches
            that training uses, for networks whose output depends on the batch.
        epochs: how often a rollout's images are learnt from.
    """

    sampler: Literal["flow_sde", "dance_sde", "cps"] = "flow_sde"
    noise_level: float = 0.7
    window: Literal["first", "random", "random_window", "sliding", "branch"] = "first"
    steps: int = 9
    within: int | None = None
    shift_every: int = 25
    shared_noise: bool = False
    trained_share: float = 1.0
    anchor: Literal["stored", "replay"] = "stored"
    epochs: int = 1

    def __post_init__(self) -> None:
        _require(self.noise_level > 0, "sde.noise_level", self.noise_level, "a positive number")
        _require(self.steps >= 1, "sde.steps", self.steps, "1 or more")
        _require(self.within is None or self.within >= self.steps, "sde.within", self.within, "sde.steps or more")
        _require(self.shift_every >= 1, "sde.shift_every", self.shift_every, "1 or more")
        _require(0 < self.trained_share <= 1, "sde.trained_share", self.trained_share, "a number in (0, 1]")
        _require(self.epochs >= 1, "sde.epochs", self.epochs, "1 or more")


@dataclass
class DrawConfig:
    """How (t, noise) pairs of the forward process are drawn for the images of a rollout.

    Args:
        per_image: pairs drawn for each image.
        noise: "per_image" (fresh for every image) or "shared_in_group" (all images of a prompt get the same pairs,
            so that what their advantages, which sum to zero, have in common cancels).
        timesteps: "uniform", "stratified" (one in each of `per_image` equal parts of (0, 1]) or "sampler_grid" (a
            random choice of the rollout's own timesteps, as in DiffusionNFT's code).
        shift: a uniform or stratified t becomes shift t / (1 + (shift - 1) t), Stable Diffusion 3's timestep shift
            (arXiv 2403.03206, eq. 23): above 1, more of the pairs are noisy ones.
    """

    per_image: int = 4
    noise: Literal["per_image", "shared_in_group"] = "shared_in_group"
    timesteps: Literal["uniform", "stratified", "sampler_grid"] = "stratified"
    shift: float = 1.0

    def __post_init__(self) -> None:
        _require(self.per_image >= 1, "draws.per_image", self.per_image, "1 or more")
        _require(0 < self.shift < math.inf, "draws.shift", self.shift, "a positive number")
        _require(
            self.shift == 1 or self.timesteps != "sampler_grid",
            "draws.shift",
            self.shift,
            "1 with draws.timesteps=sampler_grid, which is not shifted",
        )


def require_grid(draws: DrawConfig, sampler_steps: int) -> None:
    """Refuses more pairs an image than a sampler of `sampler_steps` has timesteps to take them from."""
    if draws.timesteps == "sampler_grid" and draws.per_image > sampler_steps:
        raise ValueError(
            f"draws.per_image is {draws.per_image}; with draws.timesteps=sampler_grid at most rollout.steps, "
            f"{sampler_steps}, are accepted"
        )


@dataclass
class OptimConfig:
    """AdamW and the batches it sees.

    Args:
        lr: learning rate.
        warmup: optimiser steps over which the learning rate rises linearly from 0. AdamW's first steps move every
            weight by the learning rate however small its gradient, which a pretrained model remembers.
        decay: "second_half" lets the learning rate fall linearly to 0 over the run's second half, "none" keeps it.
        hold: optimiser steps after which the learning rate also falls like hold / step, so that a run of any length
            takes few long steps; null for never.
        betas: decay rates of AdamW's two moments.
        eps: AdamW's denominator constant.
        weight_decay: decoupled weight decay.
        max_grad_norm: gradients are scaled down to this norm.
        steps_per_iteration: optimiser steps made of one rollout: each takes an equal share of the draws of the forward
            process, or of the images in the reverse process.
        micro_batch: samples in one forward and backward pass; gradients accumulate over a step.
    """

    lr: float = 2e-4
    warmup: int = 10
    decay: Literal["none", "second_half"] = "second_half"
    hold: int | None = 100
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-4
    max_grad_norm: float = 1.0
    steps_per_iteration: int = 1
    micro_batch: int = 128

    def __post_init__(self) -> None:
        _require(self.lr > 0, "optim.lr", self.lr, "a positive number")
        _require(self.warmup >= 0, "optim.warmup", self.warmup, "zero or more steps")
        _require(self.hold is None or self.hold >= 1, "optim.hold", self.hold, "1 or more steps, or null")
        _require(all(0 <= beta < 1 for beta in self.betas), "optim.betas", self.betas, "two numbers in [0, 1)")
        _require(self.eps > 0, "optim.eps", self.eps, "a positive number")
        _require(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, "zero or a positive number")
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
        _require(self.start >= 0, "rollout_policy.start", self.start, "zero or more steps")
        _require(0 <= self.maximum < 1, "rollout_policy.maximum", self.maximum, "a number in [0, 1)")


@dataclass
class ReferenceConfig:
    """How far from the reference policy a method of the forward process settles.

    Args:
        target_deviation: mean <(v - v_ref)^2> over the drawn t, so it depends on those and on the model. While it is
            exceeded, the algorithm's weight of the reference grows, by up to 2 % an iteration; below, the weight
            returns to what was set: the adaptive KL penalty of arXiv 1909.08593. No bound: a weight that is orders of
            magnitude too small takes hundreds of iterations to grow, and one of 0 stays 0. null: no such control.
    """

    target_deviation: float | None = 0.15

    def __post_init__(self) -> None:
        _require(
            self.target_deviation is None or 0 < self.target_deviation < math.inf,
            "reference.target_deviation",
            self.target_deviation,
            "a positive number, or null",
        )


@dataclass
class EvalConfig:
    """Evaluation of the learner on held-out prompts, before the first iteration, along the way and at the end.

    Args:
        every: iterations between two evaluations.
        steps: Euler steps.
        prompts_per_category: evaluation prompts of each category: of the embedded world, or, with a file of prompts, of
            each that the reward knows (the first ones).
    """

    every: int = 20
    steps: int = 10
    prompts_per_category: int = 64

    def __post_init__(self) -> None:
        _require(self.every >= 1, "evaluation.every", self.every, "1 or more")
        _require(self.steps >= 1, "evaluation.steps", self.steps, "1 or more")
        _require(self.prompts_per_category >= 1, "evaluation.prompts_per_category", self.prompts_per_category, ">= 1")


@dataclass
class RuntimeConfig:
    """What a run does for speed. Of it, `fused` and `compile` alone act on a run that trains every weight.

    Args:
        fused: run the transformer on the fused kernels of `advflow_ext.apply_to_sd3`, where there is a GPU; adapters on
            their low-rank layers anywhere.
        merge_lora: for what a policy may run on weights its adapter is merged into, which costs nothing per forward
            pass but is rounded to the base's precision: "images" to be looked at or learnt from, but whose velocities
            no loss compares with the learner's (rollouts of the forward process, rollouts whose anchor is replayed,
            evaluation); "all" forward passes without gradient, so that even the first ratio of an iteration is not 1
            and in bfloat16 small steps of the learner drown; "none".
        merged_gigabytes: memory for merged weights; a policy of SD3.5 Medium takes 0.9 in bfloat16.
        modulation_cache: compute what depends on timestep and pooled text alone once for all policies. Exact.
        compile: "regional" compiles the transformer's blocks, one by one, when they are first used.
    """

    fused: bool = True
    merge_lora: Literal["images", "all", "none"] = "images"
    merged_gigabytes: float = 4.0
    modulation_cache: bool = True
    compile: Literal["none", "regional"] = "none"

    def __post_init__(self) -> None:
        _require(self.merged_gigabytes >= 0, "runtime.merged_gigabytes", self.merged_gigabytes, "zero or more")


Algorithm = Literal[
    "advantage_flow",
    "diffusion_nft",
    "awm",
    "flow_awr",
    "reward_weighted",
    "flow_grpo",
    "dance_grpo",
    "mix_grpo",
    "flow_cps",
    "grpo_guard",
    "flow_dppo",
]


REVERSE_PROCESS: frozenset[Algorithm] = frozenset(
    ["flow_grpo", "dance_grpo", "mix_grpo", "flow_cps", "grpo_guard", "flow_dppo"]
)


@dataclass
class TrainConfig:
    """Everything `advflow train` needs. The defaults post-train the embedded world with AdvantageFlow.

    Args:
        algorithm: which policy-improvement method. Named on the command line or in a file of yours, it also brings in
            that method's own settings, where the built-in config has some for it; what you set yourself wins.
        iterations: rollout-and-update rounds.
        seed: seed of all randomness of the run.
        out: folder of the run.
        checkpoint_every: iterations between two checkpoints.
        device: "auto" is cuda where there is one, else cpu.
    """

    algorithm: Algorithm = "advantage_flow"
    iterations: int = 200
    seed: int = 0
    out: str = "runs/tiny"
    checkpoint_every: int = 20
    device: str = "auto"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    draws: DrawConfig = field(default_factory=DrawConfig)
    sde: SDEConfig = field(default_factory=SDEConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    rollout_policy: RolloutPolicyConfig = field(default_factory=RolloutPolicyConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    evaluation: EvalConfig = field(default_factory=EvalConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    advantage_flow: AdvantageFlowConfig = field(default_factory=AdvantageFlowConfig)
    diffusion_nft: DiffusionNFTConfig = field(default_factory=DiffusionNFTConfig)
    awm: AWMConfig = field(default_factory=AWMConfig)
    flow_awr: FlowAWRConfig = field(default_factory=FlowAWRConfig)
    reward_weighted: RewardWeightedConfig = field(default_factory=RewardWeightedConfig)
    flow_grpo: FlowGRPOConfig = field(default_factory=FlowGRPOConfig)
    grpo_guard: GRPOGuardConfig = field(default_factory=GRPOGuardConfig)
    flow_cps: FlowCPSConfig = field(default_factory=FlowCPSConfig)
    flow_dppo: FlowDPPOConfig = field(default_factory=FlowDPPOConfig)

    def __post_init__(self) -> None:
        require_numbers(self)
        _require(self.iterations >= 1, "iterations", self.iterations, "1 or more")
        _require(self.seed >= 0, "seed", self.seed, "zero or a positive integer")
        _require(self.checkpoint_every >= 1, "checkpoint_every", self.checkpoint_every, "1 or more")
        if self.algorithm in REVERSE_PROCESS:
            self._require_stochastic_steps()
        else:
            self._require_draws()

    def _require_draws(self) -> None:
        """What the forward process asks of settings that stand in different sections."""
        require_grid(self.draws, self.rollout.steps)
        share, rest = divmod(self.draws.per_image, self.optim.steps_per_iteration)
        _require(
            share >= 1 and rest == 0,
            "optim.steps_per_iteration",
            self.optim.steps_per_iteration,
            f"a divisor of draws.per_image, which is {self.draws.per_image}",
        )

    def _require_stochastic_steps(self) -> None:
        """What the reverse process asks of them."""
        name, reach = ("within", self.sde.within) if self.sde.within is not None else ("steps", self.sde.steps)
        if reach > self.rollout.steps - 1:
            raise ValueError(
                f"sde.{name} is {reach}; with rollout.steps={self.rollout.steps} at most {self.rollout.steps - 1} is "
                "accepted (the last step ends at sigma 0, where it has no density)"
            )
        if self.images % self.optim.steps_per_iteration:
            raise ValueError(
                f"optim.steps_per_iteration is {self.optim.steps_per_iteration}; accepted are divisors of the "
                f"{self.images} images of an iteration"
            )

    @property
    def images(self) -> int:
        """Images drawn in an iteration."""
        return self.rollout.prompts * self.rollout.images_per_prompt

    @property
    def updates(self) -> int:
        """Optimiser steps in an iteration."""
        return self.optim.steps_per_iteration * (self.sde.epochs if self.algorithm in REVERSE_PROCESS else 1)
