"""The Stable Diffusion 3.5 transformers the bench works on, what they are given, and how a command line says it."""

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


@dataclass(frozen=True)
class Size:
    """A transformer and the work it is given unless told otherwise.

    Args:
        config: arguments of SD3Transformer2DModel.
        pixels_per_latent: by how much the VAE shrinks a side.
        batch: images in a step.
        px: side of an image in pixels.
        text_tokens: length of the text sequence; 205 is CLIP's 77 and 128 of T5.
    """

    config: Callable[[], dict[str, Any]]
    pixels_per_latent: int
    batch: int
    px: int
    text_tokens: int


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


SIZES = {"sd35-medium": Size(_sd35_medium, 8, 9, 512, 205), "tiny": Size(_tiny, 4, 5, 32, 36)}


@dataclass(frozen=True)
class Work:
    """What is traced: the transformer called `model`, a batch of square images and their text."""

    model: str
    batch: int
    px: int
    text_tokens: int


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
    from diffusers import SD3Transformer2DModel

    # Neither library can build on fake tensors, both can on the meta device.
    with torch._subclasses.fake_tensor.unset_fake_temporarily(), torch.device("meta"):
        transformer: nn.Module = SD3Transformer2DModel(**SIZES[model].config()).requires_grad_(False)
        transformer.add_adapter(lora_config())  # type: ignore[operator]  # PEFT's mixin, unknown to nn.Module
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
    return transformer


def fake_inputs(transformer: nn.Module, work: Work) -> dict[str, Tensor]:
    config: Any = transformer.config
    side = work.px // SIZES[work.model].pixels_per_latent
    shapes = {
        "hidden_states": (work.batch, config.in_channels, side, side),
        "encoder_hidden_states": (work.batch, work.text_tokens, config.joint_attention_dim),
        "pooled_projections": (work.batch, config.pooled_projection_dim),
        "timestep": (work.batch,),
    }
    return {name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}


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


def add_work_arguments(p: argparse.ArgumentParser, model: str | None = "sd35-medium") -> None:
    """Of `work_of`. `model` is the default; None leaves it to the caller."""
    help_of_model = "tiny is the embedded pipeline's; default " + (model or "tiny on a CPU, else sd35-medium")
    p.add_argument("--model", choices=list(SIZES), default=model, help=help_of_model)
    p.add_argument("--batch", type=count, help="images in a step; default 9, tiny 5")
    p.add_argument("--px", type=count, help="side of an image in pixels; default 512, tiny 32")
    p.add_argument("--text-tokens", type=count, help="default 205 (77 of CLIP, 128 of T5), tiny 36")


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
    multiple = size.pixels_per_latent * config["patch_size"]
    largest = multiple * config["pos_embed_max_size"]
    if work.px % multiple or work.px > largest:
        p.error(f"--px {work.px}: {work.model} needs a multiple of {multiple} up to {largest}")
    return work
