"""The forward pass of diffusers' JointTransformerBlock on the ops of :mod:`advflow_ext.nn`.

Everything that is not one of those ops is asked of the block's own modules, by their own calls: projections
(PEFT-wrapped or not), the AdaLN projections, dropout. What is done in a module's place is done only where its class is
diffusers' or torch's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from advflow_ext.kernels import triton_ops
from advflow_ext.nn import (
    gate_residual,
    gate_residual_layer_norm_modulate,
    joint_qk_norm,
    layer_norm_modulate,
)
from advflow_ext.nn._identity import is_as_written, is_exactly
from advflow_ext.nn._stamp import stamp
from advflow_ext.nn.lora import has_hooks
from advflow_ext.patches._diffusers import Stock
from advflow_ext.patches._parts import part
from advflow_ext.patches._verify import Verifier

# On an attention module whose norms' weights were found to have none, and what they were then, by their stamps.
WITHOUT_ZEROS = "_advflow_norms_without_zeros"
CHECKED_WEIGHTS = "_advflow_norms_checked"
Module = Any  # diffusers' modules, whose attributes torch's Module does not declare
Pair = tuple[Tensor, Tensor]


class Norm1(NamedTuple):
    """What a block's first norm says about one stream.

    The context of the last block has x alone, and only a block with dual attention has x2 and gate2.
    """

    x: Tensor
    gate: Any = None
    shift_mlp: Any = None
    scale_mlp: Any = None
    gate_mlp: Any = None
    x2: Any = None
    gate2: Any = None


def is_plain(module: Any, *classes: type) -> bool:
    """Whether not calling `module`, but doing what its class, one of `classes`, does, is the same.

    Hooks, a forward of its own and classes that somebody else has derived make it another.
    """
    if not is_exactly(module, *classes):
        return False
    if torch.compiler.is_compiling():  # was asked before, when the model was patched, and Dynamo need not trace it
        return True
    return "forward" not in module.__dict__ and not has_hooks(module)


def reason_to_keep(block: Module, known: Stock) -> str | None:
    """Why a block cannot run on the fused ops; None if it can."""
    norms = {
        "norm1": known.norm1_dual if block.use_dual_attention else known.norm1,
        "norm1_context": known.norm1_last_context if block.context_pre_only else known.norm1,
        "norm2": known.layer_norm,
    }
    if not block.context_pre_only:
        norms["norm2_context"] = known.layer_norm
    width = getattr(getattr(block, "norm2", None), "normalized_shape", None)
    for name, cls in norms.items():
        norm = getattr(block, name, None)
        inner = getattr(norm, "norm", norm)
        if not isinstance(inner, nn.LayerNorm) or inner.elementwise_affine or not _is_epsilon(inner.eps):
            return f"its {name} is not a plain layer norm"
        if not is_plain(norm, cls) or not is_plain(inner, known.layer_norm):
            return f"its {name} has hooks, or a forward or a class of somebody else's"
        if len(inner.normalized_shape) != 1 or inner.normalized_shape != width:
            return f"its {name} is not a norm over the width of the block"
        if getattr(norm, "emb", None) is not None:
            return f"its {name} has an embedding of its own"
    if getattr(block, "_chunk_size", None) is not None:
        return "feed-forward chunking is on"
    return None


def reason_to_keep_attention(attn: Module, known: Stock) -> str | None:
    """Why a block's attention keeps its own processor; None if the fused one can take its place."""
    if not is_plain(attn, known.attention):
        return "it has hooks, or a forward or a class of somebody else's"
    if not is_exactly(attn.processor, known.processor):
        return f"its attention processor is {class_of(attn.processor)}"
    if getattr(attn, "fused_projections", False):
        return "its projections are fused"
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
    """Why the activation keeps its own forward, whatever hooks may come and go; None if it need not."""
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


class FusedBlock:
    """Forward passes of blocks with a set of ops in place of theirs; the rest of each block stays its own."""

    def __init__(self, ops: frozenset[str], known: Stock, verifier: Verifier | None) -> None:
        self.ops, self._known, self._verifier = ops, known, verifier

    def forward(
        self,
        stock: Callable[..., tuple[Tensor | None, Tensor]],
        block: Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        *joint_attention_kwargs: dict[str, Any] | None,
        **more: Any,
    ) -> tuple[Tensor | None, Tensor]:
        """(context, hidden states) after the block, as the block's own forward returns them.

        Joint attention's arguments are handed on as they came: the block of diffusers 0.31 takes none.
        """
        foreign = any(joint_attention_kwargs) or any(more.values())
        if foreign or not triton_ops.serves(hidden_states) or reason_to_keep(block, self._known) is not None:
            return stock(block, hidden_states, encoder_hidden_states, temb, *joint_attention_kwargs, **more)
        image = self._norm1(block.norm1, hidden_states, temb)
        text = self._norm1(block.norm1_context, encoder_hidden_states, temb)
        attn_image, attn_text = self._attention(block.attn, image.x, text.x)
        branches = [(attn_image, image.gate)]
        if block.use_dual_attention:
            branches.append((self._attention(block.attn2, image.x2, None)[0], image.gate2))
        hidden_states = self._feed_forward(block.norm2, block.ff, hidden_states, branches, image)
        if block.context_pre_only:
            return None, hidden_states
        context = self._feed_forward(
            block.norm2_context, block.ff_context, encoder_hidden_states, [(attn_text, text.gate)], text
        )
        return context, hidden_states

    @part("adaln")
    def _norm1(self, norm: Module, x: Tensor, temb: Tensor) -> Norm1:
        """AdaLN's projection of the conditioning, then layer norm and one or two modulations."""
        continuous = is_exactly(norm, self._known.norm1_last_context)
        if "adaln" not in self.ops:
            return Norm1(norm(x, temb)) if continuous else Norm1(*norm(x, emb=temb))
        if continuous:
            scale, shift = norm.linear(norm.silu(temb).to(x.dtype)).chunk(2, dim=1)
            return Norm1(self._modulate(norm, x, (scale, shift))[0])
        dual = is_exactly(norm, self._known.norm1_dual)
        parts = norm.linear(norm.silu(temb)).chunk(9 if dual else 6, dim=1)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = parts[:6]
        if not dual:
            return Norm1(self._modulate(norm, x, (scale, shift))[0], gate, shift_mlp, scale_mlp, gate_mlp)
        shift2, scale2, gate2 = parts[6:]
        y, y2 = self._modulate(norm, x, (scale, shift), (scale2, shift2))
        return Norm1(y, gate, shift_mlp, scale_mlp, gate_mlp, y2, gate2)

    @part("adaln")
    def _modulate(self, norm: Module, x: Tensor, *modulations: Pair) -> tuple[Tensor, ...]:
        """`norm` of diffusers, after its projection has given `modulations`; or torch's, and a modulation."""
        dtype = _compute_dtype(x)
        inner: Any = getattr(norm, "norm", norm)

        def fused(x: Tensor, *flat: Tensor) -> tuple[Tensor, ...]:
            return layer_norm_modulate(x, *_pairs(flat), eps=inner.eps, dtype=dtype)

        def stock(x: Tensor, *flat: Tensor) -> tuple[Tensor, ...]:
            if inner is norm:
                return (_modulated(inner(x), *flat),)
            return _own_modulation(norm, x, flat, is_exactly(norm, self._known.norm1_last_context))

        return self._run("adaln", fused, stock, x, *(tensor for pair in modulations for tensor in pair))

    @part("gate")
    def _feed_forward(self, norm: Module, ff: Module, x: Tensor, branches: list[Any], says: Norm1) -> Tensor:
        """The gated branches joined to the residual, its norm, the feed-forward network and that one's gate."""
        if {"gate", "adaln"} <= self.ops:
            dtype = _compute_dtype(x)

            def fused(x: Tensor, scale: Tensor, shift: Tensor, *flat: Tensor) -> tuple[Tensor, ...]:
                return gate_residual_layer_norm_modulate(x, _pairs(flat), (scale, shift), eps=norm.eps, dtype=dtype)

            def stock(x: Tensor, scale: Tensor, shift: Tensor, *flat: Tensor) -> tuple[Tensor, ...]:
                h = _gated(x, _pairs(flat))
                return h, _modulated(norm(h), scale, shift)

            flat = [tensor for pair in branches for tensor in pair]
            x, normed = self._run("gate", fused, stock, x, says.scale_mlp, says.shift_mlp, *flat)
        else:
            x = self._gate(x, *branches)
            if "adaln" in self.ops:
                (normed,) = self._modulate(norm, x, (says.scale_mlp, says.shift_mlp))
            else:
                normed = _modulated(norm(x), says.scale_mlp, says.shift_mlp)
        return self._gate(x, (self._mlp(ff, normed), says.gate_mlp))

    @part("gate")
    def _gate(self, x: Tensor, *branches: Pair) -> Tensor:
        if "gate" not in self.ops:
            return _gated(x, branches)

        def fused(x: Tensor, *flat: Tensor) -> tuple[Tensor, ...]:
            return (gate_residual(x, *_pairs(flat)),)

        def stock(x: Tensor, *flat: Tensor) -> tuple[Tensor, ...]:
            return (_gated(x, _pairs(flat)),)

        return self._run("gate", fused, stock, x, *(tensor for pair in branches for tensor in pair))[0]

    @part("gelu")
    def _mlp(self, ff: Module, x: Tensor) -> Tensor:
        """The feed-forward network; its activation overwrites its input where nothing will be differentiated."""
        plain = "gelu" in self.ops and is_plain(ff, self._known.feed_forward)
        if not plain or not is_plain(ff.net[0], self._known.gelu):
            out: Tensor = ff(x)
            return out
        act = ff.net[0]
        h: Tensor = act.proj(x)
        # What a hook was shown must not change under it.
        if h.requires_grad or h is x or any(map(has_hooks, _with_children(act.proj))):
            h = act.gelu(h)
        else:
            h = torch.ops.aten.gelu_(h, approximate=act.approximate)
        for module in ff.net[1:]:
            h = module(h)
        return h

    @part("attention")
    def _attention(self, attn: Module, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Attention over the image tokens and, where given, the context's. The two outputs, projected."""
        if "qk_norm" not in self.ops or reason_to_keep_attention(attn, self._known) is not None:
            out = attn(hidden_states=x) if context is None else attn(hidden_states=x, encoder_hidden_states=context)
            return (out, None) if context is None else out
        image = attn.to_q(x), attn.to_k(x), attn.to_v(x)
        weights: tuple[Tensor, ...] = (attn.norm_q.weight, attn.norm_k.weight)
        text: tuple[Tensor, ...] = ()
        if context is not None:
            text = attn.add_q_proj(context), attn.add_k_proj(context), attn.add_v_proj(context)
            weights += (attn.norm_added_q.weight, attn.norm_added_k.weight)
        q, k, v = self._joint_qkv(attn, image, text, weights)
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        out = out.transpose(1, 2).flatten(2).to(q.dtype)
        if context is None:
            return attn.to_out[1](attn.to_out[0](out)), None
        # One split, so that its backward is one concatenation instead of two zero-filled buffers added up.
        out, out_context = out.split([x.shape[1], context.shape[1]], dim=1)
        if not attn.context_pre_only:
            out_context = attn.to_add_out(out_context)
        return attn.to_out[1](attn.to_out[0](out)), out_context

    @part("qk_norm")
    def _joint_qkv(
        self, attn: Module, image: tuple[Tensor, ...], text: tuple[Tensor, ...], weights: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        streams, heads, eps = len(text) > 0, attn.heads, attn.norm_q.eps
        trained = any(weight.requires_grad for weight in weights)
        keep = "outputs" if _without_zeros(attn, weights) and not trained else "inputs"

        def unpack(tensors: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], ...]:
            return (tensors[:3], tensors[3:6], tensors[6:]) if streams else (tensors[:3], (), tensors[3:])

        def fused(*tensors: Tensor) -> tuple[Tensor, ...]:
            image, text, weights = unpack(tensors)
            given: Any = {"keep": keep}
            if streams:
                given |= {"text": text, "text_weights": weights[2:]}
            return joint_qk_norm(*image, *weights[:2], heads=heads, eps=eps, **given)

        def stock(*tensors: Tensor) -> tuple[Tensor, ...]:
            image, text, weights = unpack(tensors)
            joint = _own_stream((attn.norm_q, attn.norm_k), image, weights[:2], heads)
            if not text:
                return joint
            joint_text = _own_stream((attn.norm_added_q, attn.norm_added_k), text, weights[2:], heads)
            return tuple(torch.cat(pair, 1) for pair in zip(joint, joint_text, strict=True))

        return self._run("qk_norm", fused, stock, *image, *text, *weights)

    def _run(
        self,
        op: str,
        fused: Callable[..., tuple[Tensor, ...]],
        stock: Callable[..., tuple[Tensor, ...]],
        *tensors: Any,
    ) -> tuple[Tensor, ...]:
        if self._verifier is not None and not self._verifier.trusts(op, fused, stock, tensors):
            return stock(*tensors)
        return fused(*tensors)


def _without_zeros(attn: Module, weights: tuple[Tensor, ...]) -> bool:
    """Whether the norms' weights were found to have no zeros, and are still the same."""
    found: bool = getattr(attn, WITHOUT_ZEROS, False)
    if not found or torch.compiler.is_compiling():  # Dynamo would compile every block anew for its stamps
        return found
    return bool(getattr(attn, CHECKED_WEIGHTS) == tuple(map(stamp, weights)))


def _compute_dtype(x: Tensor) -> torch.dtype:
    """What the linear layer that reads the result would cast it to."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _pairs(flat: tuple[Tensor, ...]) -> list[Pair]:
    return list(zip(flat[::2], flat[1::2], strict=True))


@part("adaln")
def _modulated(normed: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return normed * (1 + scale[:, None]) + shift[:, None]


@part("gate")
def _gated(x: Tensor, branches: Any) -> Tensor:
    for branch, gate in branches:
        x = x + gate.unsqueeze(1) * branch
    return x


@part("adaln")
def _own_modulation(norm: Module, x: Tensor, flat: tuple[Tensor, ...], continuous: bool) -> tuple[Tensor, ...]:
    """What the forward of `norm` itself makes of `x`, were `flat`, (scale, shift) once or twice, in its projection."""

    def given(projected: Tensor) -> Tensor:
        return projected

    rest = torch.zeros_like(flat[0])
    stand_in = SimpleNamespace(emb=None, silu=given, linear=given, norm=norm.norm)
    if continuous:
        return (type(norm).forward(stand_in, x, torch.cat(flat, 1)),)
    scale, shift, *second = flat
    parts = [shift, scale, *[rest] * 4]
    if second:
        parts += [second[1], second[0], rest]
    results = type(norm).forward(stand_in, x, emb=torch.cat(parts, 1))
    return (results[0], results[5]) if second else (results[0],)


@part("qk_norm")
def _own_stream(
    norms: tuple[Module, Module], tensors: tuple[Tensor, ...], weights: tuple[Tensor, ...], heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of one stream, q and k as `norms` themselves give them with `weights` in place of theirs."""
    q, k, v = (tensor.unflatten(-1, (heads, -1)) for tensor in tensors)
    normed = [functional_call(norm, {"weight": w}, (x,)) for norm, w, x in zip(norms, weights, (q, k), strict=True)]
    return normed[0], normed[1], v


def _with_children(module: nn.Module) -> list[nn.Module]:
    """`module.modules()` without its walk, before which a PolicySet puts the base weights back."""
    return [module, *(inner for child in module.children() for inner in _with_children(child))]
