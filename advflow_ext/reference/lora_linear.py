"""A linear layer with a low-rank adapter in plain PyTorch: what PEFT computes, line for line."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from advflow_ext.contract import blocks, checks
from advflow_ext.contract.numbers import (
    require_number,
)


def lora_linear_arguments(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scale: float
) -> None:
    for name, tensor in {"x": x, "weight": weight, "lora_a": lora_a, "lora_b": lora_b}.items():
        checks.require_float_tensor(name, tensor)
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}; accepted is {x.device}, where the other tensors are.")
    if x.dim() < 1:
        raise ValueError("x has shape []; accepted is [..., in].")
    for name, tensor, shape in (
        ("weight", weight, (None, x.shape[-1])),
        ("lora_a", lora_a, (None, x.shape[-1])),
        ("lora_b", lora_b, (weight.shape[0] if weight.dim() else None, lora_a.shape[0] if lora_a.dim() else None)),
    ):
        if tensor.dim() != 2 or any(want not in (None, have) for want, have in zip(shape, tensor.shape, strict=True)):
            accepted = ["any" if size is None else size for size in shape]
            raise ValueError(f"{name} has shape {list(tensor.shape)}; accepted for x {list(x.shape)} is {accepted}.")
    if bias is not None:
        blocks.require_shape("bias", bias, weight.shape[:1], "[rows of weight]", x)
    autocast = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64  # which it leaves alone
    based = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    for name, tensor in based.items():
        if not autocast and tensor.dtype != x.dtype:
            raise ValueError(
                f"x is {x.dtype} and {name} {tensor.dtype}; accepted without autocast is one dtype for both."
            )
    if lora_a.dtype != lora_b.dtype:
        raise ValueError(f"lora_a is {lora_a.dtype} and lora_b {lora_b.dtype}; accepted is one dtype for both.")
    require_number("scale", scale)
    blocks.require_held("scale", scale, x)


def lora_linear(x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    """Same arguments, result and errors as :func:`advflow_ext.nn.lora_linear`, by PyTorch autograd.

    As in PEFT the activations are cast to the adapter's dtype, the sum is made in the wider of the two, and the result
    is rounded to the base's. Under autocast every product is in its dtype.
    """
    lora_linear_arguments(x, weight, bias, lora_a, lora_b, scale)
    base = F.linear(x, weight, bias)
    low_rank = F.linear(F.linear(x.to(lora_a.dtype), lora_a), lora_b)
    return (base + low_rank * scale).to(base.dtype)
