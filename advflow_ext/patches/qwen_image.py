"""One call that makes diffusers' Qwen-Image transformer run on the ops of :mod:`advflow_ext.nn`."""

from __future__ import annotations

from typing import Literal

from torch import nn

from advflow_ext.patches._diffusers import qwen_image_classes
from advflow_ext.patches._patch import TransformerPatch, chosen_ops, joins_lora, patch_model
from advflow_ext.patches._qwen_image_block import QwenImageBlock
from advflow_ext.patches._verify import Verifier


def apply_to_qwen_image(
    model: nn.Module,
    *,
    qk_norm: bool = True,
    adaln: bool = True,
    gate: bool = True,
    gelu: bool = True,
    lora: bool = True,
    mode: Literal["train", "infer"] = "train",
    verify: Literal["first", False] = "first",
) -> TransformerPatch:
    """Makes the transformer blocks of Qwen-Image run on fused forward and backward kernels.

    What :func:`apply_to_sd3` is to Stable Diffusion 3, with its arguments, promises and errors, for the blocks of
    ``QwenImageTransformer2DModel`` of diffusers 0.39 or newer; older ones hand the mask of the text on by other ways,
    or not at all. Blocks whose tokens have modulations of their own (``zero_cond_t``, as in Qwen-Image-Edit-2511) are
    kept. Attention stays with diffusers' dispatcher and the backend that is set there. Queries and keys are rotated as
    they are normalised; the backward pass starts from what they were before, whatever their norms' weights are.

    Raises ValueError for a model without Qwen-Image blocks, for one that is patched already, and for unknown names, and
    ImportError without diffusers, with one that is too old, or with one whose blocks take other arguments.
    """
    ops = chosen_ops({"qk_norm": qk_norm, "adaln": adaln, "gate": gate, "gelu": gelu, "lora": lora}, mode, verify)
    known, verifier = qwen_image_classes(), Verifier() if verify else None
    fused = QwenImageBlock(ops - {"lora"}, known, verifier, joint_lora=joins_lora(ops, mode))
    return patch_model(model, "a Qwen-Image transformer", ops, mode, fused)
