"""Which model, and how it is run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from advflow.settings.data import EMBEDDED
from advflow.settings.numbers import require
from advflow.settings.registry import FAMILIES

FamilyName: TypeAlias = Literal[tuple(FAMILIES)]  # type: ignore[valid-type]  # names that a checker cannot read


@dataclass
class ModelConfig:
    """Which pipeline is post-trained and which of its weights learn.

    Args:
        family: whose loading, text encoders, latents and transformer it is; see advflow.models.
        pipeline: folder or hub name of a pipeline of that family in diffusers; "embedded" is the tiny one inside this
            package.
        trainable: "full" trains every transformer weight, "lora" trains adapters on a frozen base.
        lora_rank: rank of the adapters.
        lora_alpha: scale of the adapters; their output is multiplied by alpha / rank.
        lora_targets: module names that get an adapter; null: those of the family.
        lora_start: adapter that learner and rollout policy begin with, a folder or .safetensors file of diffusers, PEFT
            or another run; the reference is the base without it. Its rank, alpha and targets must be those above. null:
            a new one.
        dtype: precision of the frozen weights and of the forward passes; what is trained is always fp32.
        vae_dtype: precision in which latents are decoded; of Stable Diffusion 3's float16 would overflow.
        vae_batch: images decoded at a time (VAE slicing); null: those that are drawn at a time.
        resolution: side of the square images in pixels.
        max_sequence_length: tokens a prompt is padded or cut to.
        gradient_checkpointing: recompute activations in the backward pass to save memory.
        random_weights: of the pipeline only the small files are read, none at all of Stable Diffusion 3.5 Medium, whose
            sizes come with the package; weights are random and so is what a prompt is encoded as. All else is a real
            run's: to try one before there are weights. What it learns is worth nothing.
    """

    family: FamilyName = "sd3"
    pipeline: str = EMBEDDED
    trainable: Literal["full", "lora"] = "full"
    lora_rank: int = 32
    lora_alpha: int = 64
    lora_targets: list[str] | None = None
    lora_start: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    vae_dtype: Literal["float32", "bfloat16"] = "float32"
    vae_batch: int | None = None
    resolution: int = 32
    max_sequence_length: int = 12
    gradient_checkpointing: bool = False
    random_weights: bool = False

    def __post_init__(self) -> None:
        require(self.vae_batch is None or self.vae_batch >= 1, "model.vae_batch", self.vae_batch, "1 or more, or null")
        require(self.lora_rank >= 1, "model.lora_rank", self.lora_rank, "1 or more")
        require(self.lora_alpha >= 1, "model.lora_alpha", self.lora_alpha, "1 or more")
        if self.lora_start is not None:
            require(self.trainable == "lora", "model.lora_start", self.lora_start, "null, or model.trainable lora")
        require(self.resolution >= 8, "model.resolution", self.resolution, "8 or more pixels")
        require(self.max_sequence_length >= 1, "model.max_sequence_length", self.max_sequence_length, "1 or more")


@dataclass
class RuntimeConfig:
    """How a run uses its machine. One that trains every weight merges and shares nothing.

    Args:
        shard: of several processes each holds a part of every weight but the adapters', by FSDP2, and of moments and
            gradients where every weight is trained. Nothing is merged then. One process alone holds all.
        fused: run the transformer on the fused kernels its family has, where there is a GPU; adapters on
            their low-rank layers anywhere.
        merge_lora: for what a policy may run on weights its adapter is merged into, which costs nothing per forward
            pass but is rounded to the base's precision: "images" to be looked at or learnt from, but whose velocities
            no loss compares with the learner's (rollouts of the forward process, rollouts whose anchor is replayed,
            evaluation); "all" forward passes without gradient, so that even the first ratio of an iteration is not 1
            and in bfloat16 small steps of the learner drown; "none".
        merged_gigabytes: memory for merged weights; of 2.5 billion parameters a policy takes 0.9 in bfloat16.
        modulation_cache: compute what depends on timestep and pooled text alone once for all policies. Exact.
        compile: "regional" compiles the transformer's blocks, one by one, when they are first used.
        cuda_graphs: replay forward and backward passes as CUDA graphs, each recorded when a policy first meets a batch
            size, so that a GPU does not wait for Python. Each batch size that is trained on keeps its activations for
            good. Then nothing is shared by `modulation_cache`.
        attention: the kernel of torch's scaled_dot_product_attention that is asked first whether it can, the others
            after it; "auto" leaves that to torch. One that cannot, as "flash" in float32, is passed over.
        tf32: float32 matrix products in TF32 where there are tensor cores: of a float32 model, and what rewards compute
            in float32. Convolutions of float32 use it by torch's own default.
    """

    shard: bool = False
    fused: bool = True
    merge_lora: Literal["images", "all", "none"] = "images"
    merged_gigabytes: float = 4.0
    modulation_cache: bool = True
    compile: Literal["none", "regional"] = "none"
    cuda_graphs: bool = False
    attention: Literal["auto", "flash", "cudnn", "efficient", "math"] = "auto"
    tf32: bool = False

    def __post_init__(self) -> None:
        if self.shard and self.cuda_graphs:
            raise ValueError(
                "runtime.cuda_graphs is True, with runtime.shard; accepted is one of them: a recording reads weights "
                "where they lay, and sharded ones are put together anew for every pass"
            )
        if self.shard and self.merge_lora == "all":
            raise ValueError(
                'runtime.merge_lora is "all", with runtime.shard, whose weights are never merged; accepted is "none", '
                'or "images", which merges where it can'
            )
        require(self.merged_gigabytes >= 0, "runtime.merged_gigabytes", self.merged_gigabytes, "zero or more")
