"""Why a block, or a part of one, keeps the forward it has."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from advflow_ext.nn._identity import is_as_written, is_exactly
from advflow_ext.nn.lora import has_hooks
from advflow_ext.patches._diffusers import Stock

Module = Any  # diffusers' modules, whose attributes torch's Module does not declare


def is_plain(module: Any, *classes: type) -> bool:
    """Whether not calling `module`, but doing what its class, one of `classes`, does, is the same.

    Hooks, a forward of its own and classes that somebody else has derived make it another.
    """
    if not is_exactly(module, *classes):
        return False
    if torch.compiler.is_compiling():  # was asked before, when the model was patched, and Dynamo need not trace it
        return True
    return "forward" not in module.__dict__ and not has_hooks(module)


def reason_to_keep_norms(block: Module, norms: dict[str, type[nn.Module]], known: Stock) -> str | None:
    """`norms` are the layer norms of a block with their classes; the first says how wide the block is."""
    width = None
    for name, cls in norms.items():
        norm = getattr(block, name, None)
        inner = getattr(norm, "norm", norm)
        if not isinstance(inner, nn.LayerNorm) or inner.elementwise_affine or not _is_epsilon(inner.eps):
            return f"its {name} is not a plain layer norm"
        if not is_plain(norm, cls) or not is_plain(inner, known.layer_norm):
            return f"its {name} has hooks, or a forward or a class of somebody else's"
        width = width or inner.normalized_shape
        if len(inner.normalized_shape) != 1 or inner.normalized_shape != width:
            return f"its {name} is not a norm over the width of the block"
        if getattr(norm, "emb", None) is not None:
            return f"its {name} has an embedding of its own"
    return None


def reason_to_keep_attention(attn: Module, known: Stock) -> str | None:
    if not is_plain(attn, known.attention):
        return "it has hooks, or a forward or a class of somebody else's"
    if not is_exactly(attn.processor, known.processor):
        return f"its attention processor is {class_of(attn.processor)}"
    if getattr(attn, "fused_projections", False):
        return "its projections are fused"
    if getattr(attn.processor, "_parallel_config", None) is not None:
        return "its sequence is split over devices"
    if getattr(attn, "inner_kv_dim", attn.inner_dim) != attn.inner_dim:
        return "its keys have fewer heads than its queries"
    for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
        norm = getattr(attn, name, None)
        if norm is None and name.startswith("norm_added") and getattr(attn, "add_q_proj", None) is None:
            continue
        if norm is None:
            return f"it has no {name}"
        if not is_plain(norm, *known.rms_norms) or norm.weight is None or getattr(norm, "bias", None) is not None:
            return f"its {name} is not a weighted RMS norm, or it has hooks"
        if norm.eps is None:  # torch then takes one that depends on what arrives, and on the device
            return f"its {name} leaves its epsilon to torch"
        if norm.weight.shape != (attn.inner_dim // attn.heads,) or norm.eps != attn.norm_q.eps:
            return f"its {name} is not a norm of single heads, or has an epsilon of its own"
        if not _is_epsilon(norm.eps):
            return f"its {name} has the epsilon {norm.eps}"
    head_dim = attn.inner_dim // attn.heads
    if head_dim < 16 or head_dim & (head_dim - 1):
        return f"its head dimension {head_dim} is no power of two from 16"
    return None


def reason_to_keep_feed_forward(ff: Module, known: Stock) -> str | None:
    """Of its activation, whatever hooks may come and go."""
    if not is_exactly(ff, known.feed_forward):
        return f"it is {class_of(ff)}"
    if not is_exactly(ff.net[0], known.gelu):
        return f"its activation is {class_of(ff.net[0])}"
    return None


def class_of(thing: object) -> str:
    """The class of what is kept, as the report says it."""
    cls = type(thing)
    if not cls.__module__.startswith("diffusers."):
        return f"{cls.__name__} of {cls.__module__}"
    return cls.__name__ if is_as_written(cls) else f"{cls.__name__} with an exchanged forward"


def _is_epsilon(eps: object) -> bool:
    return isinstance(eps, float | int) and not isinstance(eps, bool) and 0 <= eps < math.inf
