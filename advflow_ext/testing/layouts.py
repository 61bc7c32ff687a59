"""The same numbers in every memory layout that a trainer hands over."""

from __future__ import annotations

import torch
from torch import Tensor

LAYOUTS = ("contiguous", "transposed", "sliced", "offset", "expanded", "channels_last", "steps")


def arrange(tensor: Tensor, layout: str) -> Tensor:
    """The same shape in another memory layout; "expanded" repeats the first sample, the others keep the values."""
    if layout == "transposed":
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "sliced":
        return torch.stack([tensor, tensor], -1).flatten(-2)[..., ::2]
    if layout == "offset":  # off the 16-byte alignment that wide loads want
        buffer = tensor.new_empty(tensor.numel() + 1)
        buffer[1:] = tensor.flatten()
        return buffer[1:].view(tensor.shape)
    if layout == "expanded" and tensor.shape[0]:
        return tensor[:1].expand_as(tensor)
    if layout == "steps":  # one step of a trainer's [B, T, ...]
        return torch.stack([tensor, tensor], 1)[:, 1]
    if layout == "channels_last" and tensor.dim() == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    return tensor
