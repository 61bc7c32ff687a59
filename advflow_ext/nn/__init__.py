"""The SD3 transformer block's ops and LoRA layers, with backward: faster forms of the same functions and parameters."""

from advflow_ext.nn.adaln import gate_residual, gate_residual_layer_norm_modulate, layer_norm_modulate
from advflow_ext.nn.lora import is_lora_layer, lora_forward, lora_linear, lora_obstacle, merged_weight
from advflow_ext.nn.modulation_cache import ModulationCache, modulation
from advflow_ext.nn.qk_norm import joint_qk_norm

__all__ = [
    "ModulationCache",
    "gate_residual",
    "gate_residual_layer_norm_modulate",
    "is_lora_layer",
    "joint_qk_norm",
    "layer_norm_modulate",
    "lora_forward",
    "lora_linear",
    "lora_obstacle",
    "merged_weight",
    "modulation",
]
