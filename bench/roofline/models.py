"""The transformers the bench works on, what they are given, and how a command line says it."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import advflow_ext


@dataclass(frozen=True)
class Work:
    """What is traced: the transformer called `model`, a batch of square images and their text."""

    model: str
    batch: int
    px: int
    text_tokens: int


@dataclass(frozen=True)
class Family:
    """Transformers of one class.

    Args:
        transformer: its name in diffusers.
        patch: the function of ours that patches it.
        inputs: of a config, some work and the side of its latents.
    """

    transformer: str
    patch: Callable[..., Any]
    inputs: Callable[[Any, Work, int], dict[str, Any]]


def _half(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16)


def _sd3_inputs(config: Any, work: Work, side: int) -> dict[str, Any]:
    return {
        "hidden_states": _half(work.batch, config.in_channels, side, side),
        "encoder_hidden_states": _half(work.batch, work.text_tokens, config.joint_attention_dim),
        "pooled_projections": _half(work.batch, config.pooled_projection_dim),
        "timestep": _half(work.batch),
    }


def _flux_inputs(config: Any, work: Work, side: int) -> dict[str, Any]:
    return {
        "hidden_states": _half(work.batch, side**2, config.in_channels),
        "encoder_hidden_states": _half(work.batch, work.text_tokens, config.joint_attention_dim),
        "pooled_projections": _half(work.batch, config.pooled_projection_dim),
        "timestep": _half(work.batch),
        "guidance": _half(work.batch),
        "img_ids": _half(side**2, 3),
        "txt_ids": _half(work.text_tokens, 3),
    }


def _qwen_image_inputs(config: Any, work: Work, side: int) -> dict[str, Any]:
    """Without a mask of the text: the pipeline gives none where all texts are of one length."""
    return {
        "hidden_states": _half(work.batch, side**2, config.in_channels),
        "encoder_hidden_states": _half(work.batch, work.text_tokens, config.joint_attention_dim),
        "timestep": _half(work.batch),
        "img_shapes": [[(1, side, side)]] * work.batch,
    }


SD3 = Family("SD3Transformer2DModel", advflow_ext.apply_to_sd3, _sd3_inputs)
FLUX = Family("FluxTransformer2DModel", advflow_ext.apply_to_flux, _flux_inputs)
QWEN_IMAGE = Family("QwenImageTransformer2DModel", advflow_ext.apply_to_qwen_image, _qwen_image_inputs)


@dataclass(frozen=True)
class Size:
    """A transformer and the work it is given unless told otherwise.

    Args:
        config: arguments of the family's class.
        pixels_per_latent: by how much the VAE, and the pipeline's packing where it packs, shrink a side.
        batch: images in a step.
        px: side of an image in pixels.
        text_tokens: length of the text sequence; 205 is CLIP's 77 and 128 of T5.
        family: of the transformer.
    """

    config: Callable[[], dict[str, Any]]
    pixels_per_latent: int
    batch: int
    px: int
    text_tokens: int
    family: Family = SD3


def _sd35_medium() -> dict[str, Any]:
    return {
        "sample_size": 128,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 24,
        "attention_head_dim": 64,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "caption_projection_dim": 1536,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": 384,
        "dual_attention_layers": tuple(range(13)),
        "qk_norm": "rms_norm",
    }


def _tiny() -> dict[str, Any]:
    from advflow.models.sd3 import pipeline_folder
    from advflow.settings.data import EMBEDDED

    config = json.loads((Path(pipeline_folder(EMBEDDED)) / "transformer" / "config.json").read_text())
    return {name: value for name, value in config.items() if not name.startswith("_")}


def _flux1_dev() -> dict[str, Any]:
    return {"guidance_embeds": True}  # else diffusers' own defaults


SIZES = {
    "sd35-medium": Size(_sd35_medium, 8, 9, 512, 205),
    "tiny": Size(_tiny, 4, 5, 32, 36),
    "flux1-dev": Size(_flux1_dev, 16, 4, 512, 512, FLUX),
    "qwen-image": Size(dict, 16, 4, 512, 256, QWEN_IMAGE),
}
ROTATIONS = 4096  # a side, of Qwen-Image; FLUX.1 has no end
SD3_SIZES = [name for name, size in SIZES.items() if size.family is SD3]


def lora_config() -> Any:
    """PEFT's, of the adapters that `advflow` trains."""
    from advflow.models.sd3 import SD3
    from advflow.settings.model import ModelConfig
    from peft import LoraConfig

    settings = ModelConfig()
    return LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        init_lora_weights="gaussian",
        target_modules=list(SD3.lora_targets),
    )


def build_fake(model: str, adapters: torch.dtype) -> nn.Module:
    """The transformer in bf16, frozen, with trainable LoRA adapters. Call it inside a FakeTensorMode."""
    import diffusers

    size = SIZES[model]
    # Neither library can build on fake tensors, both can on the meta device.
    with torch._subclasses.fake_tensor.unset_fake_temporarily(), torch.device("meta"):
        transformer: Any = getattr(diffusers, size.family.transformer)(**size.config()).requires_grad_(False)
        transformer.add_adapter(lora_config())
    for module in transformer.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                dtype = adapters if parameter.requires_grad else torch.bfloat16
                module._parameters[name] = nn.Parameter(
                    torch.empty(parameter.shape, dtype=dtype), parameter.requires_grad
                )
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=torch.bfloat16)
    if size.family is QWEN_IMAGE:  # whose rotations are complex, and therefore no buffers
        rope = transformer.pos_embed
        transformer.pos_embed = type(rope)(rope.theta, rope.axes_dim, rope.scale_rope)
    fake: nn.Module = transformer
    return fake


def fake_inputs(transformer: nn.Module, work: Work) -> dict[str, Any]:
    size = SIZES[work.model]
    return size.family.inputs(transformer.config, work, work.px // size.pixels_per_latent)


def positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a positive number")
    return number


def count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number, 1 or more")
    return int(text)


def add_work_arguments(p: argparse.ArgumentParser, models: list[str], model: str | None = "sd35-medium") -> None:
    """Of `work_of`, for one of `models`. `model` is the default; None leaves it to the caller."""
    help_of_model = "tiny is the embedded pipeline's; default " + (model or "tiny on a CPU, else sd35-medium")
    p.add_argument("--model", choices=models, default=model, help=help_of_model)
    p.add_argument("--batch", type=count, help="images in a step; default 9, tiny 5, larger models 4")
    p.add_argument("--px", type=count, help="side of an image in pixels; default 512, tiny 32")
    help_of_text = "default 205 (77 of CLIP, 128 of T5), tiny 36, flux1-dev 512, qwen-image 256"
    p.add_argument("--text-tokens", type=count, help=help_of_text)


def work_of(options: argparse.Namespace, p: argparse.ArgumentParser) -> Work:
    """What was asked for, with the size's own numbers where nothing was; an impossible --px ends the program."""
    size = SIZES[options.model]
    work = Work(
        options.model,
        options.batch or size.batch,
        options.px or size.px,
        options.text_tokens or size.text_tokens,
    )
    config = size.config()
    patch, tokens = (config["patch_size"], config["pos_embed_max_size"]) if size.family is SD3 else (1, ROTATIONS)
    multiple = size.pixels_per_latent * patch
    largest = multiple * tokens
    if work.px % multiple or work.px > largest:
        p.error(f"--px {work.px}: {work.model} needs a multiple of {multiple} up to {largest}")
    return work
