"""What the fused forward passes of diffusers' blocks share, on the ops of :mod:`advflow_ext.nn`.

Everything that is not one of those ops is asked of the block's own modules, by their own calls: projections
(PEFT-wrapped or not), the AdaLN projections, dropout. What is done in a module's place is done only where its class is
diffusers' or torch's own.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from advflow_ext.kernels import triton_ops
from advflow_ext.nn import gate_residual, gate_residual_layer_norm_modulate, joint_qk_norm, layer_norm_modulate
from advflow_ext.nn._identity import MARK
from advflow_ext.nn._stamp import stamp
from advflow_ext.nn.lora import has_hooks
from advflow_ext.nn.lora_joint import joint_lora_forward
from advflow_ext.patches._diffusers import Stock
from advflow_ext.patches._parts import part
from advflow_ext.patches._reasons import is_plain, reason_to_keep_attention, reason_to_keep_feed_forward
from advflow_ext.patches._verify import Op, Verifier

# On an attention module whose norms' weights were found to have none, and what they were then, by their stamps.
WITHOUT_ZEROS = "_advflow_norms_without_zeros"
CHECKED_WEIGHTS = "_advflow_norms_checked"
Module = Any  # diffusers' modules, whose attributes torch's Module does not declare
Pair = tuple[Tensor, Tensor]
Known = TypeVar("Known", bound=Stock, covariant=True)


class Norm1(NamedTuple):
    """What a block's first norm says about one stream.

    The context of SD3's last block has x alone, a single block of FLUX x and gate, and only a block of SD3.5 with dual
    attention has x2 and gate2.
    """

    x: Tensor
    gate: Any = None
    shift_mlp: Any = None
    scale_mlp: Any = None
    gate_mlp: Any = None
    x2: Any = None
    gate2: Any = None


class Stream(NamedTuple):
    """Queries, keys and values of one kind of tokens, projected, and the modules that normalise the former two."""

    q: Tensor
    k: Tensor
    v: Tensor
    norm_q: Module
    norm_k: Module


class Rotation(NamedTuple):
    """Of queries and keys after their norms."""

    table: Tensor  # cosines and sines, [tokens, D / 2, 2], of all streams in their order
    own: Callable[[Tensor], Tensor]  # diffusers' own, of [B, tokens, heads, D]


class FusedBlock(Generic[Known]):
    """Forward passes of blocks of one class with a set of ops in place of theirs; the rest of each stays its own.

    A family writes the forward pass and says what its blocks are made of. ``joint_lora``: layers that read one input,
    LoRA's among them, are one function of it.
    """

    name: ClassVar[str]  # of the class
    attentions: ClassVar[tuple[str, ...]] = ("attn",)
    activations: ClassVar[tuple[str, ...]]  # where they are

    def __init__(
        self, ops: frozenset[str], known: Known, verifier: Verifier | None, *, joint_lora: bool = False
    ) -> None:
        self.ops, self._known, self._verifier, self._joint_lora = ops, known, verifier, joint_lora

    @property
    def cls(self) -> type[nn.Module]:
        """diffusers' own class of the blocks, or Exchanged."""
        return self._known.block

    def forward(self, stock: Callable[..., Any], block: Module, *args: Any, **kwargs: Any) -> Any:
        """What `stock`, the block's own forward, returns for the same arguments."""
        raise NotImplementedError

    def reason_to_keep(self, block: Module) -> str | None:
        """Why a block cannot run on the fused ops; None if it can."""
        raise NotImplementedError

    def leaves_to_stock(self, block: Module, x: Tensor, foreign: object) -> bool:
        """Whether a block runs its own forward on ``x``: given ``foreign`` arguments, without Triton, or kept."""
        return bool(foreign) or not triton_ops.serves(x) or self.reason_to_keep(block) is not None

    def reason_to_keep_attention(self, attn: Module) -> str | None:
        """Why a block's attention keeps its own processor; None if the fused one can take its place."""
        return reason_to_keep_attention(attn, self._known)

    def reason_to_keep_activation(self, module: Module) -> str | None:
        """Why an activation keeps its own forward; None if it need not."""
        return reason_to_keep_feed_forward(module, self._known)

    @part("adaln")
    def _adaln_zero(self, norm: Module, x: Tensor, temb: Tensor) -> Norm1:
        """AdaLayerNormZero: its projection of the conditioning, then layer norm and a modulation."""
        if "adaln" not in self.ops:
            return Norm1(*norm(x, emb=temb))
        shift, scale, *rest = norm.linear(norm.silu(temb)).chunk(6, dim=1)

        def stock(x: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, ...]:
            return (projected(norm, x, shift, scale, *[torch.zeros_like(scale)] * 4)[0],)

        return Norm1(self._modulate(norm.norm, stock, x, (scale, shift))[0], *rest)

    @part("adaln")
    def _norm(self, norm: Module, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """torch's layer norm, and a modulation."""

        def stock(x: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, ...]:
            return (_modulated(norm(x), scale, shift),)

        if "adaln" not in self.ops:
            return stock(x, scale, shift)[0]
        return self._modulate(norm, stock, x, (scale, shift))[0]

    @part("adaln")
    def _modulate(self, norm: Module, stock: Op, x: Tensor, *modulations: Pair) -> tuple[Tensor, ...]:
        """`norm` is torch's; `stock` computes the same of x, scale, shift (and the second pair's) by the modules."""
        dtype = _compute_dtype(x)

        def fused(x: Tensor, *flat: Tensor) -> tuple[Tensor, ...]:
            return layer_norm_modulate(x, *_pairs(flat), eps=norm.eps, dtype=dtype)

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
            normed = self._norm(norm, x, says.scale_mlp, says.shift_mlp)
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
        """The feed-forward network."""
        plain = "gelu" in self.ops and is_plain(ff, self._known.feed_forward)
        if not plain or not is_plain(ff.net[0], self._known.gelu):
            out: Tensor = ff(x)
            return out
        act = ff.net[0]
        h = overwriting_gelu(act.proj, act.gelu, act.approximate, x)
        for module in ff.net[1:]:
            h = module(h)
        return h

    def _image_stream(self, attn: Module, x: Tensor) -> Stream:
        q, k, v = self._projected(x, attn.to_q, attn.to_k, attn.to_v)
        return Stream(q, k, v, attn.norm_q, attn.norm_k)

    def _text_stream(self, attn: Module, context: Tensor) -> Stream:
        q, k, v = self._projected(context, attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        return Stream(q, k, v, attn.norm_added_q, attn.norm_added_k)

    @part("lora")
    def _projected(self, x: Tensor, *layers: Module) -> list[Tensor]:
        """What `layers`, which may be LoRA layers, give for `x`."""
        # Of those that are neither, the class is somebody else's, or its forward was when the model was patched.
        ours = all(type(layer) is self._known.linear or hasattr(type(layer), MARK) for layer in layers)
        return joint_lora_forward(layers, x) if self._joint_lora and ours else [layer(x) for layer in layers]

    @part("qk_norm")
    def _joint_qkv(self, attn: Module, *streams: Stream, rotation: Rotation | None = None) -> tuple[Tensor, ...]:
        """Normalised queries and keys, and values, of one or two streams in their order, [B, tokens, heads, D]."""
        weights = tuple(norm.weight for stream in streams for norm in (stream.norm_q, stream.norm_k))
        # Of what arrives: under tensor parallelism that is a part of the heads.
        heads, eps = streams[0].q.shape[-1] // weights[0].shape[0], streams[0].norm_q.eps
        trained = any(weight.requires_grad for weight in weights)
        rotary = None if rotation is None else rotation.table
        keep: Any = "outputs" if rotary is None and not trained and _without_zeros(attn, weights) else "inputs"

        def unpack(tensors: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], ...]:
            return tensors[:3], tensors[3 : -len(weights)], tensors[-len(weights) :]

        def fused(*tensors: Tensor) -> tuple[Tensor, ...]:
            first, second, weights = unpack(tensors)
            given: Any = {"text": second, "text_weights": weights[2:]} if second else {}
            return joint_qk_norm(*first, *weights[:2], heads=heads, eps=eps, rotary=rotary, keep=keep, **given)

        def stock(*tensors: Tensor) -> tuple[Tensor, ...]:
            first, second, weights = unpack(tensors)
            joint = _own_stream(streams[0], first, weights[:2], heads)
            if second:
                more = _own_stream(streams[1], second, weights[2:], heads)
                joint = tuple(torch.cat(pair, 1) for pair in zip(joint, more, strict=True))
            if rotation is None:
                return joint
            return rotation.own(joint[0]), rotation.own(joint[1]), joint[2]

        return self._run("qk_norm", fused, stock, *(tensor for each in streams for tensor in each[:3]), *weights)

    def _run(self, op: str, fused: Op, stock: Op, *tensors: Any) -> tuple[Tensor, ...]:
        if self._verifier is not None and not self._verifier.trusts(op, fused, stock, tensors):
            return stock(*tensors)
        return fused(*tensors)


def _without_zeros(attn: Module, weights: tuple[Tensor, ...]) -> bool:
    """Whether the norms' weights were found to have no zeros, and are still the same."""
    found: bool = getattr(attn, WITHOUT_ZEROS, False)
    if not found or torch.compiler.is_compiling():  # Dynamo would compile every block anew for its stamps
        return found
    return bool(getattr(attn, CHECKED_WEIGHTS) == set(map(stamp, weights)))


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
def projected(norm: Module, x: Tensor, *chunks: Tensor, keyword: str = "emb") -> Any:
    """What the forward of `norm`, one of diffusers' AdaLN classes, itself gives, were `chunks` in its projection."""

    def given(projection: Tensor) -> Tensor:
        return projection

    stand_in = SimpleNamespace(emb=None, silu=given, linear=given, norm=norm.norm)
    return type(norm).forward(stand_in, x, **{keyword: torch.cat(chunks, 1)})


@part("gelu")
def overwriting_gelu(proj: Module, gelu: Callable[[Tensor], Tensor], approximate: str, x: Tensor) -> Tensor:
    """`gelu` of what `proj` gives, which it overwrites where nothing will be differentiated."""
    h: Tensor = proj(x)
    # What a hook was shown must not change under it.
    if h.requires_grad or h is x or any(map(has_hooks, _with_children(proj))):
        return gelu(h)
    return torch.ops.aten.gelu_(h, approximate=approximate)  # type: ignore[no-any-return]


@part("qk_norm")
def _own_stream(
    stream: Stream, tensors: tuple[Tensor, ...], weights: tuple[Tensor, ...], heads: int
) -> tuple[Tensor, ...]:
    """q, k and v, the former two as the norms of `stream` themselves give them with `weights` in place of theirs."""
    q, k, v = (tensor.unflatten(-1, (heads, -1)) for tensor in tensors)
    norms = stream.norm_q, stream.norm_k
    normed = [functional_call(norm, {"weight": w}, (x,)) for norm, w, x in zip(norms, weights, (q, k), strict=True)]
    return normed[0], normed[1], v


def _with_children(module: nn.Module) -> list[nn.Module]:
    """`module.modules()` without its walk, before which a PolicySet puts the base weights back."""
    return [module, *(inner for child in module.children() for inner in _with_children(child))]
