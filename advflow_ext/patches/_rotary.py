"""The joint attention that FLUX and Qwen-Image have in common: text before image, rotated, by diffusers' dispatcher."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor

from advflow_ext.patches._diffusers import RotaryStock
from advflow_ext.patches._fused import FusedBlock, Module, Rotation, Stream
from advflow_ext.patches._parts import part

Known = TypeVar("Known", bound=RotaryStock, covariant=True)


class RotaryBlock(FusedBlock[Known]):
    def _rotation(self, rotary: Any, device: torch.device) -> Rotation:
        """What the transformer says about the positions of all tokens, for tensors on `device`."""
        raise NotImplementedError

    @part("attention")
    def _attend(self, attn: Module, streams: list[Stream], rotary: Any, mask: Tensor | None = None) -> Tensor:
        """Attention over the tokens of all streams, not yet projected."""
        rotation = None if rotary is None else self._rotation(rotary, streams[0].q.device)
        q, k, v = self._joint_qkv(attn, *streams, rotation=rotation)
        out: Tensor = self._known.home.dispatch_attention_fn(
            q, k, v, attn_mask=mask, backend=attn.processor._attention_backend
        )
        return out.flatten(2).to(q.dtype)

    @part("attention")
    def _joint_attention(
        self, attn: Module, x: Tensor, context: Tensor, rotary: Any, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Of image tokens and text tokens. The two outputs, projected."""
        streams = [self._text_stream(attn, context), self._image_stream(attn, x)]
        out = self._attend(attn, streams, rotary, mask)
        # One split, so that its backward is one concatenation instead of two zero-filled buffers added up.
        out_context, out = out.split([context.shape[1], x.shape[1]], dim=1)
        return attn.to_out[1](attn.to_out[0](out)), attn.to_add_out(out_context)


@part("gate")
def clipped(x: Tensor) -> Tensor:
    """float16's largest number in the place of infinity, as diffusers has it."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x
