"""A linear layer with a low-rank adapter in plain PyTorch: what PEFT computes, line for line."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from advflow_ext.ops._block_checks import lora_linear_arguments


def lora_linear(x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    """Same arguments, result and errors as :func:`advflow_ext.nn.lora_linear`, by PyTorch autograd.

    As in PEFT the activations are cast to the adapter's dtype, the sum is made in the wider of the two, and the result
    is rounded to the base's. Under autocast every product is in its dtype.
    """
    lora_linear_arguments(x, weight, bias, lora_a, lora_b, scale)
    base = F.linear(x, weight, bias)
    low_rank = F.linear(F.linear(x.to(lora_a.dtype), lora_a), lora_b)
    return (base + low_rank * scale).to(base.dtype)
