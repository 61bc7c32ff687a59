"""The ops of SD3.5's transformer blocks, at the shapes of SD3.5 Medium: ``batch x image tokens x width``.

Each is measured forward without gradients (``NAME_forward``), forward and backward with frozen modulation or norm
weights (``NAME``), and with trained ones (``NAME_trained``); the low-rank layer forward, and with trained adapters on a
frozen base. All activations ask for gradients, as in a block with adapters below it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from advflow_ext.bench.ops.adaln import AdaLN
from advflow_ext.bench.ops.block import FORWARD, FROZEN, TRAINED, Block
from advflow_ext.bench.ops.lora_linear import LoraLinear
from advflow_ext.bench.ops.qk_norm import JointQKNorm


def in_modes(name: str, block: Callable[[str], Block]) -> dict[str, Block]:
    return {name: block(FROZEN), f"{name}_forward": block(FORWARD), f"{name}_trained": block(TRAINED)}


BLOCKS: dict[str, Block] = {
    **in_modes("joint_qk_norm", functools.partial(JointQKNorm, True)),
    **in_modes("joint_qk_norm_image", functools.partial(JointQKNorm, False)),
    **in_modes("layer_norm_modulate", functools.partial(AdaLN, 0, 1)),
    **in_modes("layer_norm_modulate_2", functools.partial(AdaLN, 0, 2)),
    **in_modes("gate_residual", functools.partial(AdaLN, 1, 0)),
    **in_modes("gate_residual_layer_norm_modulate", functools.partial(AdaLN, 1, 1)),
    **in_modes("gate_residual_layer_norm_modulate_2", functools.partial(AdaLN, 2, 1)),
    "lora_linear": LoraLinear(None, TRAINED),
    "lora_linear_forward": LoraLinear(None, FORWARD),
    "lora_linear_fp32": LoraLinear(torch.float32, TRAINED),
    "lora_linear_fp32_forward": LoraLinear(torch.float32, FORWARD),
}
