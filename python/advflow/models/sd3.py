"""Stable Diffusion 3 and 3.5: everything the loop knows of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import advflow_ext as af
from advflow.models.family import TEXTS_AT_A_TIME, LoadedModel, Outline, StoredForm
from advflow.models.sd3_structure import (
    missing_weights,
    published_sizes,
    random_embeddings,
    random_pipeline,
    scheduler_of,
    text_encoders_of,
    text_shapes,
    transformer_of,
    vae_of,
)
from advflow.settings.data import EMBEDDED
from advflow.settings.model import ModelConfig


@dataclass(frozen=True)
class PromptEmbeddings:
    """What the text encoders say of a list of prompts: `tokens` [N, L, E] and `pooled` [N, P]."""

    tokens: torch.Tensor
    pooled: torch.Tensor

    def __getitem__(self, index: torch.Tensor | slice) -> PromptEmbeddings:
        return PromptEmbeddings(self.tokens[index], self.pooled[index])

    def __len__(self) -> int:
        return len(self.tokens)


class SD3:
    lora_targets: Sequence[str] = (
        "attn.to_q",
        "attn.to_k",
        "attn.to_v",
        "attn.to_out.0",
        "attn.add_q_proj",
        "attn.add_k_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
    )

    def check(self, config: ModelConfig) -> None:
        """Reads the small files of the pipeline, before gigabytes are loaded, and refuses what cannot be trained.

        Raises ValueError where `config.pipeline` is no StableDiffusion3Pipeline, or where nobody can be asked for it.
        """
        folder = configs_of(config)
        try:
            kind = StableDiffusion3Pipeline.load_config(folder).get("_class_name")
            vae = AutoencoderKL.load_config(folder, subfolder="vae")
            patch = SD3Transformer2DModel.load_config(folder, subfolder="transformer")["patch_size"]
        except (OSError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f'model.pipeline is {config.pipeline!r}; accepted: "{EMBEDDED}", the folder of a '
                f"StableDiffusion3Pipeline or its name on a hub that can be reached ({reason})"
            ) from error
        if kind != "StableDiffusion3Pipeline":
            raise ValueError(f"model.pipeline is {config.pipeline!r}, a {kind}; accepted: a StableDiffusion3Pipeline")
        _require_multiple(config.resolution, 2 ** (len(vae["block_out_channels"]) - 1) * patch)

    def outline(self, config: ModelConfig) -> Outline:
        folder = published_sizes(config.pipeline) or pipeline_folder(config.pipeline)
        self.check(replace(config, random_weights=True))
        with torch.device("meta"):
            transformer, vae = transformer_of(folder), vae_of(folder)
        shapes, dtype, scheduler = text_shapes(folder, config), getattr(torch, config.dtype), scheduler_of(folder)
        side = config.resolution // 2 ** (len(vae.config.block_out_channels) - 1)
        return Outline(
            transformer,
            vae,
            [] if config.random_weights else text_encoders_of(folder),
            (transformer.config.in_channels, side, side),
            lambda count: PromptEmbeddings(
                torch.empty(count, *shapes[0], dtype=dtype), torch.empty(count, shapes[1], dtype=dtype)
            ),
            decode,
            lambda steps: sigma_grid(scheduler, steps),
            _tensors_of,
        )

    def missing(self, config: ModelConfig) -> list[str]:
        return [] if config.random_weights else missing_weights(pipeline_folder(config.pipeline), config.pipeline)

    def load(self, config: ModelConfig, device: torch.device) -> LoadedModel:
        if config.random_weights:
            return _load_random(config, device)
        pipeline = load_pipeline(config, device)

        def encode(texts: Sequence[str]) -> PromptEmbeddings:
            return encode_prompts(pipeline, texts, config.max_sequence_length)

        stored = StoredForm(
            lambda: text_identity(pipeline, config.max_sequence_length),
            _tensors_of,
            lambda tensors: PromptEmbeddings(**tensors),
        )
        return LoadedModel(pipeline.transformer, SD3Latents(pipeline, config), encode, stored)

    def timesteps(self, t: torch.Tensor) -> torch.Tensor:
        return t * 1000.0

    def velocity(
        self,
        transformer: SD3Transformer2DModel,
        x_t: torch.Tensor,
        timestep: torch.Tensor,
        conditioning: PromptEmbeddings,
    ) -> torch.Tensor:
        """Computed in the precision of the prompt embeddings, which is that of the frozen weights."""
        dtype = conditioning.tokens.dtype
        with torch.autocast(x_t.device.type, dtype=dtype, enabled=dtype != torch.float32):
            v: torch.Tensor = transformer(
                x_t.to(dtype), conditioning.tokens, conditioning.pooled, timestep, return_dict=False
            )[0]
        return v

    def fuse(self, transformer: SD3Transformer2DModel) -> af.TransformerPatch:
        return af.apply_to_sd3(transformer)

    def save(self, transformer: SD3Transformer2DModel, adapter: str | None, folder: Path) -> None:
        """For `load_lora_weights`, with rank and alpha in the file's metadata, or for `from_pretrained`."""
        if adapter is None:
            transformer.save_pretrained(folder / "transformer")
            return
        metadata = transformer.peft_config[adapter].to_dict()
        metadata = {name: sorted(value) if isinstance(value, set) else value for name, value in metadata.items()}
        StableDiffusion3Pipeline.save_lora_weights(
            folder,
            get_peft_model_state_dict(transformer, adapter_name=adapter),
            transformer_lora_adapter_metadata=metadata,
        )
        # Of several entries of a file's metadata none has its place; with one, equal runs have equal files.
        path = folder / "pytorch_lora_weights.safetensors"
        with safe_open(path, "pt") as written:
            told = written.metadata()[LORA_ADAPTER_METADATA_KEY]
        save_file(load_file(path), path, {LORA_ADAPTER_METADATA_KEY: told})

    def blocks(self, transformer: SD3Transformer2DModel) -> Iterable[torch.nn.Module]:
        """Diffusers' own compile_repeated_blocks has no list of them."""
        blocks: Iterable[torch.nn.Module] = transformer.transformer_blocks
        return blocks

    def modulation_cache(self, transformer: SD3Transformer2DModel) -> AbstractContextManager[object]:
        return af.nn.ModulationCache(transformer)


def _load_random(config: ModelConfig, device: torch.device) -> LoadedModel:
    folder, dtype = configs_of(config), getattr(torch, config.dtype)
    shapes = text_shapes(folder, config)

    def encode(texts: Sequence[str]) -> PromptEmbeddings:
        return PromptEmbeddings(*random_embeddings(texts, shapes, dtype, device))

    identity = hashlib.sha256(f"random {shapes} {dtype} {torch.__version__}".encode()).hexdigest()
    stored = StoredForm(lambda: identity, _tensors_of, lambda tensors: PromptEmbeddings(**tensors))
    pipeline = random_pipeline(folder, dtype, getattr(torch, config.vae_dtype), device)
    return LoadedModel(pipeline.transformer, SD3Latents(pipeline, config), encode, stored)


def _tensors_of(said: PromptEmbeddings) -> dict[str, torch.Tensor]:
    return {"tokens": said.tokens, "pooled": said.pooled}


class SD3Latents:
    """Decoder and schedule, which stay after the text encoders have done their work."""

    def __init__(self, pipeline: StableDiffusion3Pipeline, config: ModelConfig) -> None:
        _require_multiple(config.resolution, pipeline.vae_scale_factor * pipeline.patch_size)
        self._vae: AutoencoderKL = pipeline.vae
        self._scheduler: FlowMatchEulerDiscreteScheduler = pipeline.scheduler
        self._at_a_time = config.vae_batch
        side = config.resolution // pipeline.vae_scale_factor
        self.shape = (pipeline.transformer.config.in_channels, side, side)

    def noise(self, count: int, generator: torch.Generator, device: torch.device) -> torch.Tensor:
        return torch.randn(count, *self.shape, generator=generator).to(device)

    def sigmas(self, steps: int) -> list[float]:
        return sigma_grid(self._scheduler, steps)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return torch.cat([decode(self._vae, part) for part in latents.split(self._at_a_time or len(latents))])


def pipeline_folder(name: str) -> str:
    """Where `StableDiffusion3Pipeline.from_pretrained` finds the pipeline called `name`."""
    return str(Path(str(resources.files("advflow.world"))) / "pipeline") if name == EMBEDDED else name


def configs_of(config: ModelConfig) -> str:
    """Where the configs of the pipeline's parts are found; of random weights those in the package where it has them."""
    own = published_sizes(config.pipeline) if config.random_weights else None
    return own or pipeline_folder(config.pipeline)


def load_pipeline(config: ModelConfig, device: torch.device) -> StableDiffusion3Pipeline:
    """Loads every part of the pipeline onto `device`, the decoder in a precision of its own.

    Raises ValueError where a part is missing.
    """
    dtypes = {"default": getattr(torch, config.dtype), "vae": getattr(torch, config.vae_dtype)}
    try:
        pipeline = StableDiffusion3Pipeline.from_pretrained(
            pipeline_folder(config.pipeline), dtype=dtypes, use_safetensors=True
        )
    except OSError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"model.pipeline is {config.pipeline!r}, which cannot be loaded: {reason}") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


@torch.no_grad()
def encode_prompts(
    pipeline: StableDiffusion3Pipeline, texts: Sequence[str], max_sequence_length: int
) -> PromptEmbeddings:
    """Encodes `texts` with all text encoders of the pipeline."""
    tokens: list[torch.Tensor] = []
    pooled: list[torch.Tensor] = []
    for start in range(0, len(texts), TEXTS_AT_A_TIME):
        chunk_tokens, _, chunk_pooled, _ = pipeline.encode_prompt(
            list(texts[start : start + TEXTS_AT_A_TIME]),
            None,
            None,
            do_classifier_free_guidance=False,
            max_sequence_length=max_sequence_length,
        )
        tokens.append(chunk_tokens)
        pooled.append(chunk_pooled)
    return PromptEmbeddings(torch.cat(tokens), torch.cat(pooled))


def text_identity(pipeline: StableDiffusion3Pipeline, max_sequence_length: int) -> str:
    """A checksum of all that decides what `encode_prompts` returns, the code aside but for its versions."""
    digest = hashlib.sha256(f"{max_sequence_length} {diffusers.__version__} {transformers.__version__}".encode())
    for number in ("", "_2", "_3"):
        tokenizer, encoder = (getattr(pipeline, f"{part}{number}") for part in ("tokenizer", "text_encoder"))
        if encoder is None:
            continue
        words = tokenizer.backend_tokenizer.to_str()
        digest.update(f"{type(tokenizer).__name__} {tokenizer.model_max_length} {words}".encode())
        digest.update(f"{type(encoder).__name__} {encoder.config.to_json_string()} {encoder.device.type}".encode())
        for name, weight in encoder.state_dict().items():
            digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
            digest.update(weight.cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def sigma_grid(scheduler: FlowMatchEulerDiscreteScheduler, steps: int) -> list[float]:
    """The scheduler's `steps + 1` noise levels, from 1 (noise) down to 0 (image)."""
    scheduler.set_timesteps(steps)
    sigmas: list[float] = scheduler.sigmas.tolist()
    return sigmas


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Images [B, 3, H, W] in [0, 1], fp32. A sample that is not finite decodes to mid grey."""
    scaled = latents / vae.config.scaling_factor + vae.config.shift_factor
    images = vae.decode(scaled.to(vae.dtype), return_dict=False)[0].float()
    return torch.nan_to_num(images / 2 + 0.5, nan=0.5, posinf=0.5, neginf=0.5).clamp_(0, 1)


def _require_multiple(resolution: int, multiple: int) -> None:
    if resolution % multiple:
        raise ValueError(f"model.resolution is {resolution}; this pipeline needs a multiple of {multiple}")
