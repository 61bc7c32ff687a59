"""RMS norm of queries and keys per head, rotated or not, written straight into the buffers that attention reads."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from advflow_ext import reference
from advflow_ext.kernels import triton_ops
from advflow_ext.reference.joint_qk_norm import joint_qk_norm_arguments


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
    """Queries and keys normalised per head, image tokens before text tokens, as joint attention reads them.

    ::

        norm(x) = x / sqrt(mean(x^2) + eps) * weight          over the D elements of one head, in float32
        q' = [norm_q(q), norm_text_q(text_q)],  k' likewise,  v' = [v, text_v]

    and with ``rotary``, before q' and k' are rounded, elements 2i and 2i + 1 of each head become::

        (y_2i cos_i - y_2i+1 sin_i,  y_2i+1 cos_i + y_2i sin_i)        with the angles of the token

    One launch forward and one backward, each tensor read and written once: no float32 copies, no concatenation. No
    weight gradient is computed where no weight asks for one.

    Arguments:
        q, k, v: projections of the image tokens ``[B, N, heads * D]`` of one dtype; rows may be strided.
        weight_q, weight_k: ``[D]``, any floating-point dtype.
        text: q, k and v of the text tokens ``[B, M, heads * D]``; text_weights: theirs. None: image tokens alone, as in
            SD3.5's second attention; v comes back as it is. Where text comes first, as in FLUX.1 and Qwen-Image, give
            its tensors as q, k and v and those of the image as ``text``.
        rotary: cosine and sine of each angle, ``[N + M, D / 2, 2]``, for the tokens of both in their order, fixed:
            ``torch.view_as_real`` of the complex numbers of Qwen-Image, ``torch.stack([cos[:, ::2], sin[:, ::2]], -1)``
            of the tables of FLUX.1. None: nothing is rotated.
        keep: what is kept for the backward pass. "inputs": q and k. "outputs": q' and k', which attention keeps anyway,
            and one float32 a head and token: no activation memory to speak of. The backward pass then divides q' by the
            weight, so no weight may hold a zero (such an element would give NaN) or ask for a gradient (ValueError);
            the rounding of q' is added to that of the result, and stays below it. With ``rotary``, which would mix the
            rounding of one element into another that may have a far smaller weight, "inputs" alone (ValueError).

    Returns q', k', v' ``[B, N + M, heads, D]`` in q's dtype; ``.transpose(1, 2)`` is what
    ``scaled_dot_product_attention`` takes. On float64, a D that is no power of two or below 16, or where Triton cannot
    run, :func:`advflow_ext.reference.joint_qk_norm` serves.

    Differs from diffusers' RMSNorm and rotations in rounding once in half precision, and in keeping q's dtype where the
    weight is float32.

    Raises ValueError, naming argument, value and what is accepted.
    """
    joint_qk_norm_arguments(q, k, v, weight_q, weight_k, heads, eps, text, text_weights, rotary, keep)
    head_dim = q.shape[2] // heads
    if not triton_ops.serves(q) or head_dim < 16 or head_dim & (head_dim - 1):
        return reference.joint_qk_norm(
            q, k, v, weight_q, weight_k, heads=heads, eps=eps, text=text, text_weights=text_weights, rotary=rotary
        )
    if text is None or text_weights is None:
        joint_q, joint_k = _apply([q, k], [], [weight_q, weight_k], rotary, heads, eps, keep)
        return joint_q, joint_k, v.unflatten(-1, (heads, -1))
    weights = [weight_q, weight_k, *text_weights]
    joint_q, joint_k, joint_v = _apply([q, k, v], [*text], weights, rotary, heads, eps, keep)
    return joint_q, joint_k, joint_v


def _apply(
    image: list[Tensor],
    text: list[Tensor],
    weights: list[Tensor],
    rotary: Tensor | None,
    heads: int,
    eps: float,
    keep: str,
) -> list[Tensor]:
    image, text = triton_ops.unit_stride(image), triton_ops.unit_stride(text)
    rotary = None if rotary is None else rotary.contiguous()
    if triton_ops.differentiated((*image, *text, *weights)):
        return list(_JointQKNorm.apply(heads, eps, len(text) > 0, keep == "outputs", rotary, *image, *text, *weights))
    joint: list[Tensor] = torch.ops.advflow.joint_qk_norm(image, text, weights, rotary, heads, eps, False)
    return joint


class _JointQKNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, heads: int, eps: float, has_text: bool, keep_outputs: bool, rotary: Tensor | None, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        streams = 3 if has_text else 2
        image, rest = tensors[:streams], tensors[streams:]
        text, weights = (rest[:3], rest[3:]) if has_text else ((), rest)
        found = torch.ops.advflow.joint_qk_norm(image, text, weights, rotary, heads, eps, keep_outputs)
        if keep_outputs:
            ctx.save_for_backward(*weights, None, found[-1], *found[:2])
        else:
            ctx.save_for_backward(*weights, rotary, *image[:2], *text[:2])
        ctx.eps, ctx.keep_outputs, ctx.weights, ctx.image_tokens = eps, keep_outputs, len(weights), image[0].shape[1]
        return tuple(found[:streams])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: under gradient checkpointing each look at it is a recomputation
        weights, saved = saved[: ctx.weights], saved[ctx.weights :]
        rotary, saved = saved[0], saved[1:]
        rstd, saved = (saved[0], saved[1:]) if ctx.keep_outputs else (None, saved)
        weight_grad = any(ctx.needs_input_grad[-len(weights) :])
        incoming, tokens = triton_ops.unit_stride(grads), ctx.image_tokens
        found = torch.ops.advflow.joint_qk_norm_backward(
            incoming, saved[:2], saved[2:], weights, rotary, rstd, tokens, ctx.eps, weight_grad
        )
        latents = len(grads) * (2 if ctx.weights == 4 else 1)
        of_weights: list[Tensor | None] = [None] * len(weights)
        if weight_grad:
            of_weights = [grad.to(weight.dtype) for grad, weight in zip(found[latents], weights, strict=True)]
        return None, None, None, None, None, *found[:latents], *of_weights


def _forward_shapes(
    image: list[Tensor],
    text: list[Tensor],
    weights: list[Tensor],
    rotary: Tensor | None,
    heads: int,
    eps: float,
    keep_rstd: bool,
) -> list[Tensor]:
    batch, tokens, width = image[0].shape
    tokens = tokens + (text[0].shape[1] if text else 0)
    joint = [x.new_empty(batch, tokens, heads, width // heads) for x in image]
    return joint + [x.new_empty((2, batch, tokens, heads), dtype=torch.float32) for x in image[:1] if keep_rstd]


def _backward_shapes(
    grads: list[Tensor],
    image: list[Tensor],
    text: list[Tensor],
    weights: list[Tensor],
    rotary: Tensor | None,
    rstd: Tensor | None,
    image_tokens: int,
    eps: float,
    weight_grad: bool,
) -> list[Tensor]:
    batch, tokens, heads, head_dim = grads[0].shape
    found = [image[0].new_empty(batch, image_tokens, heads * head_dim) for _ in grads]
    if len(weights) == 4:
        found += [image[0].new_empty(batch, tokens - image_tokens, heads * head_dim) for _ in grads]
    if weight_grad:
        found.append(weights[0].new_empty((len(weights), *weights[0].shape), dtype=torch.float32))
    return found


triton_ops.define(
    "joint_qk_norm(Tensor[] image, Tensor[] text, Tensor[] weights, Tensor? rotary, int heads, float eps, "
    "bool keep_rstd) -> Tensor[]",
    "qk_norm",
    "forward",
    _forward_shapes,
)
triton_ops.define(
    "joint_qk_norm_backward(Tensor[] grads, Tensor[] image, Tensor[] text, Tensor[] weights, Tensor? rotary, "
    "Tensor? rstd, SymInt image_tokens, float eps, bool weight_grad) -> Tensor[]",
    "qk_norm",
    "backward",
    _backward_shapes,
)
