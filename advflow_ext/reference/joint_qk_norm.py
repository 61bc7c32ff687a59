"""RMS norm of queries and keys per head, then joint attention's buffers, in plain differentiable PyTorch."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from advflow_ext.ops._block_checks import joint_qk_norm_arguments


def joint_qk_norm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    *,
    heads: int,
    eps: float = 1e-6,
    text: tuple[Tensor, Tensor, Tensor] | None = None,
    text_weights: tuple[Tensor, Tensor] | None = None,
    keep: Literal["inputs", "outputs"] = "inputs",
) -> tuple[Tensor, Tensor, Tensor]:
    """Same arguments, result and errors as :func:`advflow_ext.nn.joint_qk_norm`, by PyTorch autograd.

    What is kept for the backward pass is autograd's choice, whatever ``keep`` says.
    """
    joint_qk_norm_arguments(q, k, v, weight_q, weight_k, heads, eps, text, text_weights, keep)

    def split(x: Tensor) -> Tensor:
        parts: Tensor = x.unflatten(-1, (heads, -1))
        return parts

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        wide = split(x).to(torch.promote_types(x.dtype, torch.float32))
        normed: Tensor = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight
        return normed.to(x.dtype)

    joint = norm(q, weight_q), norm(k, weight_k), split(v)
    if text is None or text_weights is None:
        return joint
    parts = norm(text[0], text_weights[0]), norm(text[1], text_weights[1]), split(text[2])
    joint_q, joint_k, joint_v = (torch.cat(pair, 1) for pair in zip(joint, parts, strict=True))
    return joint_q, joint_k, joint_v
