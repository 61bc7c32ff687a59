"""Small models with PEFT's adapters on them, their matrices random so that no adapter does nothing."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

TARGETS = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.to_add_out"]


def transformer(dtype: torch.dtype = torch.float32) -> SD3Transformer2DModel:
    """Two blocks in the shape of SD3.5's: dual attention in the first, QK-norm in both, no text output of the last."""
    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=32,
        pooled_projection_dim=24,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return model.to(dtype).requires_grad_(False)


def inputs(dtype: torch.dtype = torch.float32, batch: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Latents, tokens, pooled text and timesteps for :func:`transformer`."""
    rng = torch.Generator().manual_seed(1)
    x, tokens, pooled = (torch.randn(batch, *shape, generator=rng) for shape in ((4, 8, 8), (5, 12), (24,)))
    return x.to(dtype), tokens.to(dtype), pooled.to(dtype), torch.linspace(100.0, 900.0, batch)


def with_adapters(
    *names: str,
    dtype: torch.dtype = torch.float32,
    adapter_dtype: torch.dtype = torch.float32,
    size: float = 0.3,
    **settings: Any,
) -> SD3Transformer2DModel:
    model = transformer(dtype)
    for seed, name in enumerate(names):
        model.add_adapter(LoraConfig(**({"r": 4, "lora_alpha": 6, "target_modules": TARGETS} | settings)), name)
        fill(model, name, adapter_dtype, size, seed)
    model.set_adapter(names[0])
    return model


def layer(features: int = 24, **settings: Any) -> Any:
    """One of PEFT's LoRA layers, with the adapter "default"."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(features, features)).requires_grad_(False)
    inject_adapter_in_model(LoraConfig(**({"r": 4, "lora_alpha": 6, "target_modules": ["0"]} | settings)), model)
    fill(model, "default", torch.float32, 0.3, 0)
    return model[0]


def fill(model: nn.Module, name: str, dtype: torch.dtype, size: float, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if f".{name}." in path and "lora_" in path:
                parameter.data = (size * torch.randn(parameter.shape, generator=rng)).to(dtype)
