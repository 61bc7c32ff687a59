"""The forward pass of diffusers' QwenImageTransformerBlock on the ops of :mod:`advflow_ext.nn`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from advflow_ext.patches._diffusers import RotaryStock
from advflow_ext.patches._fused import Module, Norm1, Rotation
from advflow_ext.patches._parts import part
from advflow_ext.patches._reasons import reason_to_keep_norms
from advflow_ext.patches._rotary import RotaryBlock, clipped

Rotary = tuple[Tensor, Tensor]  # of image and text: complex numbers of length 1, [tokens, D / 2] each


class QwenImageBlock(RotaryBlock[RotaryStock]):
    name = "QwenImageTransformerBlock"
    activations = ("img_mlp", "txt_mlp")

    def reason_to_keep(self, block: Module) -> str | None:
        norms = dict.fromkeys(("img_norm1", "img_norm2", "txt_norm1", "txt_norm2"), self._known.layer_norm)
        if reason := reason_to_keep_norms(block, norms, self._known):
            return reason
        return "its tokens have modulations of their own" if block.zero_cond_t else None

    def forward(
        self,
        stock: Callable[..., tuple[Tensor, Tensor]],
        block: Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor | None,
        temb: Tensor,
        image_rotary_emb: Rotary | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        modulate_index: Any = None,
    ) -> tuple[Tensor, Tensor]:
        """(text, image) after the block, as the block's own forward returns them."""
        foreign = joint_attention_kwargs or modulate_index is not None
        if self.leaves_to_stock(block, hidden_states, foreign):
            given = encoder_hidden_states_mask, temb, image_rotary_emb, joint_attention_kwargs, modulate_index
            return stock(block, hidden_states, encoder_hidden_states, *given)
        image = self._norm1(block.img_norm1, block.img_mod, hidden_states, temb)
        text = self._norm1(block.txt_norm1, block.txt_mod, encoder_hidden_states, temb)
        attn_image, attn_text = self._attention(
            block.attn, image.x, text.x, image_rotary_emb, encoder_hidden_states_mask
        )
        context = self._feed_forward(
            block.txt_norm2, block.txt_mlp, encoder_hidden_states, [(attn_text, text.gate)], text
        )
        hidden_states = self._feed_forward(
            block.img_norm2, block.img_mlp, hidden_states, [(attn_image, image.gate)], image
        )
        return clipped(context), clipped(hidden_states)

    @part("adaln")
    def _norm1(self, norm: Module, projection: Module, x: Tensor, temb: Tensor) -> Norm1:
        shift, scale, *rest = projection(temb).chunk(6, dim=-1)
        return Norm1(self._norm(norm, x, scale, shift), *rest)

    @part("attention")
    def _attention(
        self, attn: Module, x: Tensor, context: Tensor, rotary: Rotary | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if "qk_norm" not in self.ops or self.reason_to_keep_attention(attn) is not None:
            given = {"encoder_hidden_states_mask": mask, "image_rotary_emb": rotary}
            out, out_context = attn(hidden_states=x, encoder_hidden_states=context, **given)
            return out, out_context
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(x.shape[:2])], 1)[:, None, None]
        return self._joint_attention(attn, x, context, rotary, mask)

    @part("attention")
    def _rotation(self, rotary: Rotary, device: torch.device) -> Rotation:
        image, text = rotary
        joint = torch.cat([text, image]).to(device)

        def own(x: Tensor) -> Tensor:
            rotated: Tensor = self._known.home.apply_rotary_emb_qwen(x, joint, use_real=False)
            return rotated

        return Rotation(torch.view_as_real(joint), own)
