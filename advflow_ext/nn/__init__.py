"""Ops of the SD3 transformer block, with backward, for training and sampling. Needs torch; Triton makes them fast."""

from advflow_ext.nn.adaln import gate_residual, gate_residual_layer_norm_modulate, layer_norm_modulate
from advflow_ext.nn.qk_norm import joint_qk_norm

__all__ = ["gate_residual", "gate_residual_layer_norm_modulate", "joint_qk_norm", "layer_norm_modulate"]
