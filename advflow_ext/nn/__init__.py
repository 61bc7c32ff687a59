"""Layers of diffusion transformers that train and sample faster than their stock forms, with the same parameters."""

from advflow_ext.nn.lora import is_lora_layer, lora_forward, lora_linear, lora_obstacle, merged_weight
from advflow_ext.nn.modulation_cache import ModulationCache, modulation

__all__ = [
    "ModulationCache",
    "is_lora_layer",
    "lora_forward",
    "lora_linear",
    "lora_obstacle",
    "merged_weight",
    "modulation",
]
