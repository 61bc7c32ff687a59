"""The forward pass of diffusers' JointTransformerBlock on the ops of :mod:`advflow_ext.nn`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from advflow_ext.nn._identity import is_exactly
from advflow_ext.patches._diffusers import SD3Stock
from advflow_ext.patches._fused import FusedBlock, Module, Norm1, projected
from advflow_ext.patches._parts import part
from advflow_ext.patches._reasons import reason_to_keep_norms


class SD3Block(FusedBlock[SD3Stock]):
    name = "JointTransformerBlock"
    attentions = ("attn", "attn2")
    activations = ("ff", "ff_context")

    def reason_to_keep(self, block: Module) -> str | None:
        known = self._known
        norms = {
            "norm2": known.layer_norm,
            "norm1": known.norm1_dual if block.use_dual_attention else known.norm1,
            "norm1_context": known.norm1_last_context if block.context_pre_only else known.norm1,
        }
        if not block.context_pre_only:
            norms["norm2_context"] = known.layer_norm
        if reason := reason_to_keep_norms(block, norms, known):
            return reason
        return "feed-forward chunking is on" if getattr(block, "_chunk_size", None) is not None else None

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
        if self.leaves_to_stock(block, hidden_states, foreign):
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
        if is_exactly(norm, self._known.norm1):
            return self._adaln_zero(norm, x, temb)
        continuous = is_exactly(norm, self._known.norm1_last_context)
        if "adaln" not in self.ops:
            return Norm1(norm(x, temb)) if continuous else Norm1(*norm(x, emb=temb))
        if continuous:
            scale, shift = norm.linear(norm.silu(temb).to(x.dtype)).chunk(2, dim=1)

            def once(x: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, ...]:
                return (projected(norm, x, scale, shift, keyword="conditioning_embedding"),)

            return Norm1(self._modulate(norm.norm, once, x, (scale, shift))[0])
        parts = norm.linear(norm.silu(temb)).chunk(9, dim=1)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = parts[:6]
        shift2, scale2, gate2 = parts[6:]

        def twice(x: Tensor, scale: Tensor, shift: Tensor, scale2: Tensor, shift2: Tensor) -> tuple[Tensor, ...]:
            zeros = torch.zeros_like(scale)
            results = projected(norm, x, shift, scale, *[zeros] * 4, shift2, scale2, zeros)
            return results[0], results[5]

        y, y2 = self._modulate(norm.norm, twice, x, (scale, shift), (scale2, shift2))
        return Norm1(y, gate, shift_mlp, scale_mlp, gate_mlp, y2, gate2)

    @part("attention")
    def _attention(self, attn: Module, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Attention over the image tokens and, where given, the context's. The two outputs, projected."""
        if "qk_norm" not in self.ops or self.reason_to_keep_attention(attn) is not None:
            out = attn(hidden_states=x) if context is None else attn(hidden_states=x, encoder_hidden_states=context)
            return (out, None) if context is None else out
        streams = [self._image_stream(attn, x)]
        if context is not None:
            streams.append(self._text_stream(attn, context))
        q, k, v = self._joint_qkv(attn, *streams)
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        out = out.transpose(1, 2).flatten(2).to(q.dtype)
        if context is None:
            return attn.to_out[1](attn.to_out[0](out)), None
        # One split, so that its backward is one concatenation instead of two zero-filled buffers added up.
        out, out_context = out.split([x.shape[1], context.shape[1]], dim=1)
        if not attn.context_pre_only:
            out_context = attn.to_add_out(out_context)
        return attn.to_out[1](attn.to_out[0](out)), out_context
