"""One call that makes diffusers' FLUX.1 transformer run on the ops of :mod:`advflow_ext.nn`."""

from __future__ import annotations

from typing import Literal

from torch import nn

from advflow_ext.patches._diffusers import flux_classes
from advflow_ext.patches._flux_block import FluxBlock, FluxSingleBlock
from advflow_ext.patches._patch import TransformerPatch, chosen_ops, joins_lora, patch_model
from advflow_ext.patches._verify import Verifier


def apply_to_flux(
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
    """Makes the transformer blocks of FLUX.1, with two streams and with one, run on fused kernels.

    What :func:`apply_to_sd3` is to Stable Diffusion 3, with its arguments, promises and errors, for the blocks of
    ``FluxTransformer2DModel`` of diffusers 0.35 or newer. A block that is given ``joint_attention_kwargs``, as those of
    an IP-Adapter, runs its own forward. Attention stays with diffusers' dispatcher and the backend that is set there.
    Queries and keys are rotated as they are normalised; the backward pass starts from what they were before, whatever
    their norms' weights are.

    Raises ValueError for a model without FLUX blocks, for one that is patched already, and for unknown names, and
    ImportError without diffusers, with one that is too old, or with one whose blocks take other arguments.
    """
    ops = chosen_ops({"qk_norm": qk_norm, "adaln": adaln, "gate": gate, "gelu": gelu, "lora": lora}, mode, verify)
    given = ops - {"lora"}, flux_classes(), Verifier() if verify else None
    blocks = [cls(*given, joint_lora=joins_lora(ops, mode)) for cls in (FluxBlock, FluxSingleBlock)]
    return patch_model(model, "a FLUX.1 transformer", ops, mode, *blocks)
