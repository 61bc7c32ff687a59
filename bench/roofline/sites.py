"""Which part of diffusers' SD3, FLUX.1 or Qwen-Image transformer an operator belongs to."""

from __future__ import annotations

from torch import nn

from advflow_ext.patches import _flux_block, _fused, _qwen_image_block, _rotary, _sd3_block
from advflow_ext.patches._parts import Part, parts_of
from bench.roofline.account import GRADIENT_SUMS, OTHER, Origin, Source

QK_NORM = "QK-RMSNorm"
JOINT = "joint concat, reshape, cast"
ADALN = "AdaLN norm1"  # of Qwen-Image, which does both in one way, norm2 too
NORM2 = "norm2 LN + modulate"
ROTARY = "rotary embedding"
GATE = "gate * x + residual"
GELU = "GELU"
STREAMS = "concat of streams and branches"
LORA = "LoRA scale, add, cast"
LORA_GEMM = "LoRA GEMMs"
GEMM = "base GEMMs"
ATTENTION = "attention"

SITES = (
    QK_NORM,
    ROTARY,
    JOINT,
    ADALN,
    NORM2,
    GATE,
    GELU,
    STREAMS,
    LORA,
    LORA_GEMM,
    GRADIENT_SUMS,
    OTHER,
    ATTENTION,
    GEMM,
)

# The patched block by the parts that its functions are marked with. QK norm also writes the joint buffers, and the norm
# that follows a gate is one operator with it.
_SITES: dict[Part, str] = {
    "qk_norm": QK_NORM,
    "attention": JOINT,
    "adaln": ADALN,
    "gate": GATE,
    "gelu": GELU,
    "lora": LORA,
    "streams": STREAMS,
}
_FILES = (_fused, _rotary, _sd3_block, _flux_block, _qwen_image_block)
_CLASSES = {cls for home in _FILES for cls in vars(home).values() if isinstance(cls, type)}
_PARTS = parts_of(*_FILES, *_CLASSES)
_BLOCKS = ("JointTransformerBlock", "FluxTransformerBlock", "FluxSingleTransformerBlock", "QwenImageTransformerBlock")


def site_of(origin: Origin) -> str:
    """The site of an operator, one of SITES."""
    if origin.kind == "attention":
        return ATTENTION
    if origin.kind == "gemm":
        return GEMM if origin.frozen else LORA_GEMM
    if origin.phase == "forward":
        if origin.source is not None and origin.source.file in {home.__file__ for home in _FILES}:
            return _of_patched_block(origin.source.function)
        if origin.source is not None and origin.source.function.startswith("apply_rotary_emb"):
            return ROTARY
        if origin.source is not None and origin.source.function == "GELU.gelu":  # called past the module's forward
            return GELU
        return _of_module(origin)
    if origin.source is not None and "lora" in f"{origin.source.file}{origin.source.function}".lower():
        return LORA
    return origin.forward_site or OTHER


def _of_patched_block(function: str) -> str:
    """`function` is qualified, as FusedBlock._modulate.<locals>.fused."""
    outer = function.partition(".<locals>")[0]
    if outer not in _PARTS:
        raise ValueError(f"{outer} of a patched block issues operators and is marked with no part of a block")
    return _SITES[_PARTS[outer]]


def _of_module(origin: Origin) -> str:
    """By the innermost module that says something, else by the line of the block."""
    for name, module in reversed(origin.modules):
        site = _of_class(name, module)
        if site is not None:
            return site
        if type(module).__name__ in _BLOCKS:
            return _of_line(origin.source)
    return OTHER


def _of_class(name: str, module: nn.Module) -> str | None:
    kind = type(module).__name__
    if kind.endswith("RMSNorm") and "attn" in name:
        return QK_NORM
    if kind == "Linear" and not hasattr(module, "lora_A"):  # PEFT's wrapper is a Linear too
        return LORA if ".lora_" in name else GEMM
    if hasattr(module, "lora_A"):
        return LORA
    if "AdaLayerNorm" in kind:
        return ADALN
    if kind == "LayerNorm":
        if ".img_norm" in name or ".txt_norm" in name:
            return ADALN
        return NORM2 if ".norm2" in name else None  # the one inside an AdaLN is the AdaLN's
    return {"GELU": GELU, "Attention": JOINT, "FluxAttention": JOINT}.get(kind)


def _of_line(source: Source | None) -> str:
    if source is None:
        return OTHER
    if source.function.endswith("._modulate") or "_mod(" in source.text:
        return ADALN
    if "scale_mlp" in source.text or "norm2" in source.text:
        return NORM2
    if "torch.cat(" in source.text:
        return STREAMS
    return GATE if any(mark in source.text for mark in ("gate", "hidden_states +", "residual +")) else OTHER
