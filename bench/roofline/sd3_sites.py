"""Which part of diffusers' SD3 transformer an operator belongs to."""

from __future__ import annotations

from torch import nn

from bench.roofline.account import GRADIENT_SUMS, OTHER, Origin

QK_NORM = "QK-RMSNorm"
JOINT = "joint concat, reshape, cast"
ADALN = "AdaLN norm1"
NORM2 = "norm2 LN + modulate"
GATE = "gate * x + residual"
GELU = "GELU"
LORA = "LoRA scale, add, cast"
LORA_GEMM = "LoRA GEMMs"
GEMM = "base GEMMs"
ATTENTION = "attention"

SITES = (QK_NORM, JOINT, ADALN, NORM2, GATE, GELU, LORA, LORA_GEMM, GRADIENT_SUMS, OTHER, ATTENTION, GEMM)

# The patched block by the functions that issue operators. QK norm also writes the joint buffers, and the norm that
# follows a gate is one operator with it.
_PATCHED_BLOCK = "_sd3_block.py"
_OURS = {"_joint_qkv": QK_NORM, "_attention": JOINT, "_norm1": ADALN, "_modulate": ADALN, "_mlp": GELU}


def site_of(origin: Origin) -> str:
    """The site of an operator, one of SITES."""
    if origin.kind == "attention":
        return ATTENTION
    if origin.kind == "gemm":
        return GEMM if origin.frozen else LORA_GEMM
    if origin.phase == "forward":
        if origin.source is not None and origin.source.file.endswith(_PATCHED_BLOCK):
            return _of_patched_block(origin.source.function)
        if origin.source is not None and origin.source.function == "GELU.gelu":  # called past the module's forward
            return GELU
        return _of_module(origin)
    if origin.source is not None and "lora" in f"{origin.source.file}{origin.source.function}".lower():
        return LORA
    return origin.forward_site or OTHER


def _of_patched_block(function: str) -> str:
    """`function` is qualified, as FusedBlock._modulate.<locals>.fused."""
    return next((site for name, site in _OURS.items() if f".{name}" in function), GATE)


def _of_module(origin: Origin) -> str:
    """By the innermost module that says something, else by the line of the block."""
    for name, module in reversed(origin.modules):
        site = _of_class(name, module)
        if site is not None:
            return site
        if type(module).__name__ == "JointTransformerBlock":
            return _of_line(origin.source.text if origin.source else "")
    return OTHER


def _of_class(name: str, module: nn.Module) -> str | None:
    kind = type(module).__name__
    if kind.endswith("RMSNorm"):
        return QK_NORM
    if kind == "Linear" and not hasattr(module, "lora_A"):  # PEFT's wrapper is a Linear too
        return LORA if ".lora_" in name else GEMM
    if hasattr(module, "lora_A"):
        return LORA
    if "AdaLayerNorm" in kind:
        return ADALN
    if kind == "LayerNorm":
        return NORM2 if ".norm2" in name else None  # the one inside an AdaLN is the AdaLN's
    return {"GELU": GELU, "Attention": JOINT}.get(kind)


def _of_line(line: str) -> str:
    if "scale_mlp" in line or "norm2" in line:
        return NORM2
    return GATE if "gate" in line or "hidden_states +" in line else OTHER
