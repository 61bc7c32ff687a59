"""Stable Diffusion 3's parts from their configs alone: shapes for estimates, and random weights."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import AutoConfig, CLIPTextModelWithProjection, T5EncoderModel

from advflow.core.hub import has_one_of
from advflow.settings.model import ModelConfig

SD35_MEDIUM = "stabilityai/stable-diffusion-3.5-medium"
_TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
_WEIGHTS = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "model.safetensors",
    "model.safetensors.index.json",
)


def published_sizes(name: str) -> str | None:
    """A folder in the package with the configs of the pipeline called `name`; None where there is none."""
    return str(Path(str(resources.files("advflow.models"))) / "sd35_medium") if name == SD35_MEDIUM else None


def missing_weights(name: str, given: str) -> list[str]:
    """What is not on this machine of the pipeline `name`, which the settings call `given`, and how to get it."""
    if name == SD35_MEDIUM and not has_one_of(name, ["model_index.json"]):
        return [
            f"model.pipeline is {given!r}, which is not on this machine: accept its licence at "
            f"https://huggingface.co/{name}, then hf auth login; hf download {name} --exclude sd3.5_medium.safetensors "
            "--exclude 'text_encoders/*' --exclude '*fp16*' (16 GB); or name a folder that has it"
        ]
    if not has_one_of(name, ["model_index.json"]):
        return []  # what is no pipeline is said by who reads its configs
    index = StableDiffusion3Pipeline.load_config(name, local_files_only=True)
    parts = [part for part in ("transformer", "vae", *_TEXT_ENCODERS) if (index.get(part) or [None])[0] is not None]
    lacking = [part for part in parts if not has_one_of(name, [f"{part}/{file}" for file in _WEIGHTS])]
    if not lacking:
        return []
    where = ", ".join(f"{part}/" for part in lacking)
    return [f"model.pipeline is {given!r}, which has no .safetensors weights in {where}: hf download {SD35_MEDIUM}"]


def transformer_of(folder: str) -> SD3Transformer2DModel:
    return SD3Transformer2DModel.from_config(SD3Transformer2DModel.load_config(folder, subfolder="transformer"))


def vae_of(folder: str) -> AutoencoderKL:
    return AutoencoderKL.from_config(AutoencoderKL.load_config(folder, subfolder="vae"))


def scheduler_of(folder: str) -> FlowMatchEulerDiscreteScheduler:
    config = FlowMatchEulerDiscreteScheduler.load_config(folder, subfolder="scheduler")
    return FlowMatchEulerDiscreteScheduler.from_config(config)


def text_encoders_of(folder: str) -> list[torch.nn.Module]:
    """Those that the pipeline has, on the meta device."""
    index = StableDiffusion3Pipeline.load_config(folder)
    kinds = (CLIPTextModelWithProjection, CLIPTextModelWithProjection, T5EncoderModel)
    with torch.device("meta"):
        return [
            kind(AutoConfig.from_pretrained(folder, subfolder=part))
            for part, kind in zip(_TEXT_ENCODERS, kinds, strict=True)
            if (index.get(part) or [None])[0] is not None
        ]


def text_shapes(folder: str, config: ModelConfig) -> tuple[tuple[int, int], int]:
    """Of what a prompt is encoded as: (tokens, width), and the width of what stands for it as a whole."""
    transformer = SD3Transformer2DModel.load_config(folder, subfolder="transformer")
    clip: Any = AutoConfig.from_pretrained(folder, subfolder="text_encoder")
    tokens = clip.max_position_embeddings + config.max_sequence_length
    return (tokens, transformer["joint_attention_dim"]), transformer["pooled_projection_dim"]


def random_pipeline(
    folder: str, dtype: torch.dtype, vae_dtype: torch.dtype, device: torch.device
) -> StableDiffusion3Pipeline:
    """Transformer and decoder with random weights, the same ones each time, and no text encoders."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer, vae = transformer_of(folder).to(dtype), vae_of(folder).to(vae_dtype)
    absent = dict.fromkeys((*_TEXT_ENCODERS, "tokenizer", "tokenizer_2", "tokenizer_3"))
    pipeline = StableDiffusion3Pipeline(transformer=transformer, vae=vae, scheduler=scheduler_of(folder), **absent)
    pipeline.transformer.eval()
    pipeline.vae.eval()
    return pipeline.to(device)


def random_embeddings(
    texts: Sequence[str], shapes: tuple[tuple[int, int], int], dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Standard normal numbers [N, tokens, width] and [N, width], drawn from each text: the same for the same."""
    tokens, pooled = [], []
    for text in texts:
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big", signed=True)
        rng = torch.Generator().manual_seed(seed)
        tokens.append(torch.randn(shapes[0], generator=rng))
        pooled.append(torch.randn(shapes[1], generator=rng))
    return torch.stack(tokens).to(device, dtype), torch.stack(pooled).to(device, dtype)
