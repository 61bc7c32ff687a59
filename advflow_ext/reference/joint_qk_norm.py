"""RMS norm of queries and keys per head, then joint attention's buffers, in plain differentiable PyTorch."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from advflow_ext.contract import blocks, checks

_MOST_ROWS = 2**31 - 2**10  # the kernel counts them in int32, and up to the end of its last tile


def joint_qk_norm_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    heads: int,
    eps: float,
    text: tuple[Tensor, Tensor, Tensor] | None,
    text_weights: tuple[Tensor, Tensor] | None,
    rotary: Tensor | None,
    keep: str,
) -> None:
    blocks.require_tokens("q", q)
    for name, value in {"k": k, "v": v}.items():
        blocks.require_shape(name, value, q.shape, "that of q", q)
    width = q.shape[2]
    if isinstance(heads, bool) or not isinstance(heads, int) or heads < 1 or width % heads:
        raise ValueError(f"heads is {heads!r}; accepted is a positive divisor of q's width {width}.")
    blocks.require_eps(eps, q)
    blocks.require_dtype_of("q", q, {"k": k, "v": v})
    weights = {"weight_q": weight_q, "weight_k": weight_k}
    if (text is None) != (text_weights is None):
        raise ValueError("text and text_weights are given together or not at all.")
    if text is not None and text_weights is not None:
        blocks.require_several("text", text, ("q", "k", "v"))
        blocks.require_several("text_weights", text_weights, ("weight of q", "weight of k"))
        blocks.require_tokens("text[0]", text[0])
        blocks.require_shape("text[0]", text[0], (q.shape[0], text[0].shape[1], width), "[B, M, width of q]", q)
        for name, value in (("text[1]", text[1]), ("text[2]", text[2])):
            blocks.require_shape(name, value, text[0].shape, "that of text[0]", q)
        blocks.require_dtype_of("q", q, {"text[0]": text[0], "text[1]": text[1], "text[2]": text[2]})
        weights |= {"text_weights[0]": text_weights[0], "text_weights[1]": text_weights[1]}
    for name, weight in weights.items():
        blocks.require_shape(name, weight, (width // heads,), "[width of q / heads]", q)
    if rotary is not None:
        tokens, head_dim = q.shape[1] + (text[0].shape[1] if text is not None else 0), width // heads
        if head_dim % 2:
            raise ValueError(f"rotary turns pairs of elements and heads have {head_dim}; accepted is an even number.")
        shape = tokens, head_dim // 2, 2
        blocks.require_shape("rotary", rotary, shape, "[tokens of q and text, width of q / heads / 2, 2]", q)
        if keep == "outputs":
            raise ValueError("keep is 'outputs' and rotary is given; accepted is then 'inputs'.")
        if rotary.requires_grad:
            raise ValueError("rotary asks for a gradient; accepted are fixed angles.")
    checks.require_choice("keep", keep, ("inputs", "outputs"))
    if keep == "outputs" and any(weight.requires_grad for weight in weights.values()):
        raise ValueError("keep is 'outputs' and a weight asks for a gradient; accepted is then 'inputs'.")
    rows = q.shape[0] * heads * (q.shape[1] + (text[0].shape[1] if text is not None else 0))
    if rows >= _MOST_ROWS:
        raise ValueError(f"q and text hold {rows} heads of tokens; accepted are fewer than {_MOST_ROWS}.")


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
    rotary: Tensor | None = None,
    keep: Literal["inputs", "outputs"] = "inputs",
) -> tuple[Tensor, Tensor, Tensor]:
    """Same arguments, result and errors as :func:`advflow_ext.nn.joint_qk_norm`, by PyTorch autograd.

    What is kept for the backward pass is autograd's choice, whatever ``keep`` says.
    """
    joint_qk_norm_arguments(q, k, v, weight_q, weight_k, heads, eps, text, text_weights, rotary, keep)

    def split(x: Tensor) -> Tensor:
        parts: Tensor = x.unflatten(-1, (heads, -1))
        return parts

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        wide = split(x).to(torch.promote_types(x.dtype, torch.float32))
        normed: Tensor = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight
        return normed

    def rotated(x: Tensor) -> Tensor:
        if rotary is None:
            return x
        cos, sin = rotary[:, None].unbind(-1)
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)

    joint = norm(q, weight_q), norm(k, weight_k), split(v)
    if text is not None and text_weights is not None:
        parts = norm(text[0], text_weights[0]), norm(text[1], text_weights[1]), split(text[2])
        joint_q, joint_k, joint_v = (torch.cat(pair, 1) for pair in zip(joint, parts, strict=True))
        joint = joint_q, joint_k, joint_v
    return rotated(joint[0]).to(q.dtype), rotated(joint[1]).to(q.dtype), joint[2]
