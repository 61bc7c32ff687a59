"""SD3 transformers with random weights, run and compared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from diffusers import SD3Transformer2DModel
from peft import LoraConfig
from torch import Tensor, nn

from advflow_ext.testing import relative_error
from tests.nn.kernel_checks import KERNEL_DEVICE

TARGETS = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"]
TARGETS += ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"]
# A whole model in float32: the roundings of both, a few times 6e-8 an op, through some hundred ops.
FLOAT32_ERROR = 1e-5


def adapters(rank: int = 4) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=2 * rank, init_lora_weights=False, target_modules=TARGETS)


def transformer(layers: int, heads: int, head_dim: int, lora: bool = True, **options) -> SD3Transformer2DModel:
    """Random weights of a size at which every term matters; frozen but for the adapters."""
    torch.manual_seed(0)
    settings = {
        "sample_size": 8,
        "patch_size": 1,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": layers,
        "attention_head_dim": head_dim,
        "num_attention_heads": heads,
        "joint_attention_dim": 24,
        "caption_projection_dim": heads * head_dim,
        "pooled_projection_dim": 16,
        "pos_embed_max_size": 8,
        "dual_attention_layers": (0,),
        "qk_norm": "rms_norm",
    }
    model = SD3Transformer2DModel(**settings | options)
    model.requires_grad_(False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.5 / max(parameter.shape[-1], 4) ** 0.5)
    if lora:
        model.add_adapter(adapters())
    return model.to(KERNEL_DEVICE)


def tiny(**options) -> SD3Transformer2DModel:
    return transformer(3, 2, 32, **options)


def inputs(dtype: torch.dtype = torch.float32, side: int = 3) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng).to(KERNEL_DEVICE, dtype)

    return {
        "hidden_states": normal(2, 4, side, side),
        "encoder_hidden_states": normal(2, 3, 24),
        "pooled_projections": normal(2, 16),
        "timestep": torch.tensor([100.0, 700.0], device=KERNEL_DEVICE),
    }


def run(model: nn.Module, given: dict[str, Tensor], call: Callable[..., tuple[Tensor]] | None = None) -> list[Tensor]:
    """The output, and the gradients of everything that is trained but those of zero, which compiled code writes."""
    model.zero_grad(set_to_none=True)
    out = (model if call is None else call)(**given, return_dict=False)[0]
    if not out.requires_grad:
        return [out]
    pattern = torch.arange(out.numel(), device=out.device).remainder(5).sub(2).view(out.shape).to(out.dtype)
    (out * pattern).sum().backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None and p.grad.any())]


def backward_nodes(out: Tensor) -> Counter[str]:
    """How many nodes of each name the backward pass of `out` has."""
    seen, left = set(), [out.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            left += [following for following, _ in node.next_functions]
    return Counter(node.name() for node in seen)


def assert_same(actual: list[Tensor], expected: list[Tensor], tolerance: float = FLOAT32_ERROR) -> None:
    assert len(actual) == len(expected)
    errors = [relative_error(one, other) for one, other in zip(actual, expected, strict=True)]
    assert max(errors) <= tolerance, errors
