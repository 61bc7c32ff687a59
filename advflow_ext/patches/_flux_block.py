"""The forward passes of diffusers' FLUX.1 blocks, of two streams and of one, on the ops of :mod:`advflow_ext.nn`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from advflow_ext.nn._identity import is_exactly
from advflow_ext.patches._diffusers import FluxStock
from advflow_ext.patches._fused import Module, Norm1, Rotation, overwriting_gelu, projected
from advflow_ext.patches._parts import part
from advflow_ext.patches._reasons import class_of, is_plain, reason_to_keep_norms
from advflow_ext.patches._rotary import RotaryBlock, clipped

Rotary = tuple[Tensor, Tensor]  # cosines and sines, [tokens, D] each


class _FluxBlock(RotaryBlock[FluxStock]):
    @part("attention")
    def _rotation(self, rotary: Rotary, device: torch.device) -> Rotation:
        """FluxPosEmbed has each angle twice, for both elements of its pair."""
        cos, sin = (table.to(device)[:, ::2] for table in rotary)
        table = torch.stack([cos, sin], -1)

        def own(x: Tensor) -> Tensor:
            rotated: Tensor = self._known.home.apply_rotary_emb(x, rotary, sequence_dim=1)
            return rotated

        return Rotation(table, own)


class FluxBlock(_FluxBlock):
    name = "FluxTransformerBlock"
    activations = ("ff", "ff_context")

    def reason_to_keep(self, block: Module) -> str | None:
        known = self._known
        norms = {"norm2": known.layer_norm, "norm2_context": known.layer_norm}
        norms |= {"norm1": known.norm1, "norm1_context": known.norm1}
        return reason_to_keep_norms(block, norms, known)

    def forward(
        self,
        stock: Callable[..., tuple[Tensor, Tensor]],
        block: Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: Rotary | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(text, image) after the block, as the block's own forward returns them."""
        if self.leaves_to_stock(block, hidden_states, joint_attention_kwargs):
            return stock(block, hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs)
        image = self._adaln_zero(block.norm1, hidden_states, temb)
        text = self._adaln_zero(block.norm1_context, encoder_hidden_states, temb)
        attn_image, attn_text = self._attention(block.attn, image.x, text.x, image_rotary_emb)
        hidden_states = self._feed_forward(block.norm2, block.ff, hidden_states, [(attn_image, image.gate)], image)
        context = self._feed_forward(
            block.norm2_context, block.ff_context, encoder_hidden_states, [(attn_text, text.gate)], text
        )
        return clipped(context), hidden_states

    @part("attention")
    def _attention(self, attn: Module, x: Tensor, context: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor]:
        if "qk_norm" in self.ops and self.reason_to_keep_attention(attn) is None:
            return self._joint_attention(attn, x, context, rotary)
        out, out_context = attn(hidden_states=x, encoder_hidden_states=context, image_rotary_emb=rotary)
        return out, out_context


class FluxSingleBlock(_FluxBlock):
    name = "FluxSingleTransformerBlock"
    activations = ("act_mlp",)

    @property
    def cls(self) -> type[nn.Module]:
        return self._known.single_block

    def reason_to_keep(self, block: Module) -> str | None:
        return reason_to_keep_norms(block, {"norm": self._known.single_norm}, self._known)

    def reason_to_keep_activation(self, module: Module) -> str | None:
        return None if is_exactly(module, self._known.single_gelu) else f"it is {class_of(module)}"

    def forward(
        self,
        stock: Callable[..., tuple[Tensor, Tensor]],
        block: Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: Rotary | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(text, image) after the block, as the block's own forward returns them."""
        if self.leaves_to_stock(block, hidden_states, joint_attention_kwargs):
            return stock(block, hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs)
        x = _joined(encoder_hidden_states, hidden_states)
        normed, gate = self._single_norm(block.norm, x, temb)[:2]
        mlp = self._single_mlp(block, normed)
        attended = self._attention(block.attn, normed, image_rotary_emb)
        x = clipped(self._gate(x, (_projected_together(block.proj_out, attended, mlp), gate)))
        return _parted(x, encoder_hidden_states.shape[1])

    @part("adaln")
    def _single_norm(self, norm: Module, x: Tensor, temb: Tensor) -> Norm1:
        """AdaLayerNormZeroSingle."""
        if "adaln" not in self.ops:
            return Norm1(*norm(x, emb=temb))
        shift, scale, gate = norm.linear(norm.silu(temb)).chunk(3, dim=1)

        def stock(x: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, ...]:
            return (projected(norm, x, shift, scale, torch.zeros_like(scale))[0],)

        return Norm1(self._modulate(norm.norm, stock, x, (scale, shift))[0], gate)

    @part("gelu")
    def _single_mlp(self, block: Module, x: Tensor) -> Tensor:
        act = block.act_mlp
        if "gelu" in self.ops and is_plain(act, self._known.single_gelu):
            return overwriting_gelu(block.proj_mlp, act, act.approximate, x)
        out: Tensor = act(block.proj_mlp(x))
        return out

    @part("attention")
    def _attention(self, attn: Module, x: Tensor, rotary: Rotary | None) -> Tensor:
        if "qk_norm" in self.ops and self.reason_to_keep_attention(attn) is None:
            return self._attend(attn, [self._image_stream(attn, x)], rotary)
        out: Tensor = attn(hidden_states=x, image_rotary_emb=rotary)
        return out


@part("streams")
def _joined(text: Tensor, image: Tensor) -> Tensor:
    return torch.cat([text, image], 1)


@part("streams")
def _parted(x: Tensor, text_tokens: int) -> tuple[Tensor, Tensor]:
    # One split, so that its backward is one concatenation instead of two zero-filled buffers added up.
    text, image = x.split([text_tokens, x.shape[1] - text_tokens], dim=1)
    return text, image


@part("streams")
def _projected_together(proj: Module, attended: Tensor, mlp: Tensor) -> Tensor:
    projected: Tensor = proj(torch.cat([attended, mlp], 2))
    return projected
