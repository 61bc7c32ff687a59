"""Which part of diffusers' SD3 transformer an operator belongs to."""

from __future__ import annotations

from torch import nn

from advflow_ext.patches import _sd3_block
from advflow_ext.patches._parts import Part, parts_of
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

# The patched block by the parts that its functions are marked with. QK norm also writes the joint buffers, and the norm
# that follows a gate is one operator with it.
_SITES: dict[Part, str] = {"qk_norm": QK_NORM, "attention": JOINT, "adaln": ADALN, "gate": GATE, "gelu": GELU}
_PARTS = parts_of(_sd3_block, _sd3_block.FusedBlock)


def site_of(origin: Origin) -> str:
    """The site of an operator, one of SITES."""
    if origin.kind == "attention":
        return ATTENTION
    if origin.kind == "gemm":
        return GEMM if origin.frozen else LORA_GEMM
    if origin.phase == "forward":
        if origin.source is not None and origin.source.file == _sd3_block.__file__:
            return _of_patched_block(origin.source.function)
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
        raise ValueError(f"{outer} of {_sd3_block.__name__} issues operators and is marked with no part of a block")
    return _SITES[_PARTS[outer]]


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
