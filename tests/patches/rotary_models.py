"""FLUX.1 and Qwen-Image transformers with random weights, and what each is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, QwenImageTransformer2DModel
from torch import Tensor

import advflow_ext as af
from tests.nn.kernel_checks import KERNEL_DEVICE
from tests.patches.sd3_models import adapters

ROTARY_AXES = (4, 6, 6)  # of heads of 16 elements
IMAGE, TEXT, SIDE = 4, 3, 2  # tokens


def flux(lora: bool = True) -> Any:
    """One block of two streams, one of one."""
    return _random(
        FluxTransformer2DModel,
        lora,
        num_layers=1,
        num_single_layers=1,
        pooled_projection_dim=12,
        guidance_embeds=True,
    )


def qwen_image(lora: bool = True, **options: Any) -> Any:
    return _random(QwenImageTransformer2DModel, lora, num_layers=2, out_channels=1, **options)


def _random(cls: Any, lora: bool, **options: Any) -> Any:
    """Random weights of a size at which every term matters; frozen but for the adapters."""
    torch.manual_seed(0)
    sizes = {"in_channels": 4, "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 24}
    model = cls(**sizes, axes_dims_rope=ROTARY_AXES, **options).requires_grad_(False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.5 / max(parameter.shape[-1], 4) ** 0.5)
    if lora:
        model.add_adapter(adapters())
    return model.to(KERNEL_DEVICE)


def _inputs(dtype: torch.dtype, **shapes: tuple[int, ...]) -> dict[str, Any]:
    rng = torch.Generator().manual_seed(1)
    shapes = {"hidden_states": (2, IMAGE, 4), "encoder_hidden_states": (2, TEXT, 24)} | shapes
    # Times and guidance are a thousand times as large inside, and numbers of bfloat16 there too: rounded, they would be
    # all the error there is.
    return {name: torch.randn(shape, generator=rng).to(KERNEL_DEVICE, dtype) for name, shape in shapes.items()} | {
        "timestep": torch.tensor([0.125, 0.5], device=KERNEL_DEVICE, dtype=dtype)
    }


def flux_inputs(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    places = torch.arange(IMAGE, device=KERNEL_DEVICE)
    return _inputs(dtype, pooled_projections=(2, 12)) | {
        "guidance": torch.full((2,), 4.0, device=KERNEL_DEVICE, dtype=dtype),
        "img_ids": torch.stack([torch.zeros_like(places), places // SIDE, places % SIDE], 1).float(),
        "txt_ids": torch.zeros(TEXT, 3, device=KERNEL_DEVICE),
    }


def qwen_image_inputs(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """The second text is shorter than the first."""
    mask = torch.ones(2, TEXT, device=KERNEL_DEVICE, dtype=torch.long)
    mask[1, 2:] = 0
    return _inputs(dtype) | {"encoder_hidden_states_mask": mask, "img_shapes": [[(1, SIDE, SIDE)]] * 2}


@dataclass(frozen=True)
class Family:
    make: Callable[..., Any]
    inputs: Callable[..., dict[str, Any]]
    apply: Callable[..., af.TransformerPatch]
    blocks: str  # where they are, and one of them
    replaced: dict[str, int]


FLUX = Family(
    flux,
    flux_inputs,
    af.apply_to_flux,
    "single_transformer_blocks.0",
    {"adaln": 2, "gate": 2, "gelu": 2, "qk_norm": 2, "lora": 11},
)
QWEN_IMAGE = Family(
    qwen_image,
    qwen_image_inputs,
    af.apply_to_qwen_image,
    "transformer_blocks.0",
    {"adaln": 2, "gate": 2, "gelu": 2, "qk_norm": 2, "lora": 16},
)


def as_dtype(given: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Of what is a floating-point tensor, but for positions, which are exact in any."""
    return {
        name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in given.items()
    }
