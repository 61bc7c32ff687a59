"""Queries, keys and values made ready for attention: ours, and as diffusers and other libraries write it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

import advflow_ext as af
from advflow_ext.bench.harness.registry import DTYPES, OURS, Arguments, Case, Shape
from advflow_ext.bench.ops.block import EPS, FORWARD, HEAD_DIM, LIGER, QUACK, Block, Function, Tensors

Norm = Callable[[Tensor, Tensor], Tensor]


def diffusers_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """diffusers' RMSNorm, operator by operator."""
    variance = x.to(torch.promote_types(x.dtype, torch.float32)).pow(2).mean(-1, keepdim=True)
    x = x * torch.rsqrt(variance + EPS)
    if weight.dtype in (torch.float16, torch.bfloat16):
        x = x.to(weight.dtype)
    return x * weight


def torch_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, (HEAD_DIM,), weight, EPS)


def liger_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_rms_norm as norm

    out: Tensor = norm(x, weight, EPS, 0.0, "llama", False)
    return out


def quack_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    from quack import rmsnorm

    out: Tensor = rmsnorm(x, weight, eps=EPS)
    return out


def diffusers_joint(activations: Tensors, weights: Tensors) -> tuple[Tensor, ...]:
    """JointAttnProcessor2_0 up to attention: heads before tokens, then norms, then a concatenation."""
    split = [x.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for x in activations]
    q, k = diffusers_rms_norm(split[0], weights[0]), diffusers_rms_norm(split[1], weights[1])
    if len(split) == 2:
        return q, k
    text = diffusers_rms_norm(split[3], weights[2]), diffusers_rms_norm(split[4], weights[3]), split[5]
    return tuple(torch.cat(pair, 2) for pair in zip((q, k, split[2]), text, strict=True))


def joint_by(norm: Norm) -> Function:
    """With a library's norm, whose input stays contiguous: heads come first when everything is done."""

    def joint(activations: Tensors, weights: Tensors) -> tuple[Tensor, ...]:
        split = [x.unflatten(-1, (-1, HEAD_DIM)) for x in activations]
        parts = [norm(split[0], weights[0]), norm(split[1], weights[1])]
        if len(split) > 2:
            text = [norm(split[3], weights[2]), norm(split[4], weights[3]), split[5]]
            parts = [torch.cat(pair, 1) for pair in zip([*parts, split[2]], text, strict=True)]
        return tuple(part.transpose(1, 2) for part in parts)

    return joint


def our_joint(activations: Tensors, weights: Tensors) -> tuple[Tensor, ...]:
    heads = activations[0].shape[2] // HEAD_DIM
    keep: Literal["inputs", "outputs"] = "inputs" if weights[0].requires_grad else "outputs"  # as apply_to_sd3 chooses
    if len(activations) == 2:
        q, k = activations
        joint = af.nn.joint_qk_norm(q, k, k, *weights, heads=heads, keep=keep)
        return tuple(part.transpose(1, 2) for part in joint[:2])  # v is looked at and handed back
    q, k, v, *text = activations
    given: Any = {"heads": heads, "text": tuple(text), "text_weights": weights[2:], "keep": keep}
    return tuple(part.transpose(1, 2) for part in af.nn.joint_qk_norm(q, k, v, *weights[:2], **given))


class JointQKNorm(Block):
    """Attention's q, k and v of image and text, or q and k of the image alone, as attention takes them."""

    def __init__(self, text: bool, mode: str) -> None:
        super().__init__(mode)
        self.text = text

    def text_tokens(self, shape: Shape) -> int:
        """SD3.5's 205 (77 of CLIP, 128 of T5); never more than image tokens, for small shapes."""
        return min(205, shape[1]) if self.text else 0

    def activation_shapes(self, shape: Shape) -> list[Shape]:
        batch, _, width = shape
        return [shape] * 3 + [(batch, self.text_tokens(shape), width)] * 3 if self.text else [shape] * 2

    def parameters(self, shape: Shape, normal: Callable[..., Tensor]) -> list[Tensor]:
        return [1 + 0.1 * normal(HEAD_DIM) for _ in range(4 if self.text else 2)]

    def result_shapes(self, shape: Shape) -> list[Shape]:
        batch, tokens, width = shape
        return [(batch, tokens + self.text_tokens(shape), width // HEAD_DIM, HEAD_DIM)] * (3 if self.text else 2)

    def arguments(self, case: Case, device: torch.device, seed: int) -> Arguments:
        """Gradients lie as attention's backward pass leaves them where q, k and v were ours: tokens before heads."""
        given = super().arguments(case, device, seed)
        return Arguments(given.call, incoming=tuple(grad.transpose(1, 2) for grad in given.incoming))

    def functions(self) -> dict[str, Function]:
        return {
            OURS: our_joint,
            "eager": diffusers_joint,
            "library": joint_by(torch_rms_norm),
            LIGER: joint_by(liger_rms_norm),
            QUACK: joint_by(quack_rms_norm),
        }

    def bytes_moved(self, case: Case) -> int:
        """Forward each is read and written; backward their gradients, and q and k are read again."""
        streams = 3 if self.text else 2
        passes = 2 * streams + (0 if self.mode == FORWARD else 2 * streams + 2)
        batch, tokens, width = case.shape
        return passes * batch * (tokens + self.text_tokens(case.shape)) * width * DTYPES[case.dtype].itemsize
