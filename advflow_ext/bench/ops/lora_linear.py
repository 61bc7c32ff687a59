"""Linear layers with an adapter: ours, and as PEFT writes it."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

import advflow_ext as af
from advflow_ext.bench.harness.registry import DTYPES, OURS, Case, Shape
from advflow_ext.bench.ops.block import FORWARD, Block, Function, Tensors

RANK, LORA_SCALE = 32, 2.0  # as advflow trains SD3.5 Medium


class LoraLinear(Block):
    """A projection of attention on a frozen base; ``adapter_dtype`` None: that of the case."""

    def __init__(self, adapter_dtype: torch.dtype | None, mode: str) -> None:
        super().__init__(mode)
        self.adapter_dtype = adapter_dtype

    def activation_shapes(self, shape: Shape) -> list[Shape]:
        return [shape]

    def parameters(self, shape: Shape, normal: Callable[..., Tensor]) -> list[Tensor]:
        """Weight, bias, and the adapter's two matrices."""
        width = shape[2]
        adapters = [normal(RANK, width, dtype=self.adapter_dtype), normal(width, RANK, dtype=self.adapter_dtype)]
        return [normal(width, width) / width**0.5, normal(width), adapters[0] / width**0.5, adapters[1] / RANK**0.5]

    def train(self, parameters: Tensors) -> None:
        super().train(parameters[2:])

    def result_shapes(self, shape: Shape) -> list[Shape]:
        return [shape]

    def functions(self) -> dict[str, Function]:
        def ours(activations: Tensors, parameters: Tensors) -> tuple[Tensor, ...]:
            (x,), (weight, bias, a, b) = activations, parameters
            return (af.nn.lora_linear(x, weight, bias, a, b, LORA_SCALE),)

        def peft(activations: Tensors, parameters: Tensors) -> tuple[Tensor, ...]:
            (x,), (weight, bias, a, b) = activations, parameters
            return (af.reference.lora_linear(x, weight, bias, a, b, LORA_SCALE),)

        def library(activations: Tensors, parameters: Tensors) -> tuple[Tensor, ...]:
            """The adapters are cast, not the activations; scale and sum are one launch."""
            (x,), (weight, bias, a, b) = activations, parameters
            low_rank = F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype))
            return (torch.add(F.linear(x, weight, bias), low_rank, alpha=LORA_SCALE),)

        return {OURS: ours, "eager": peft, "library": library}

    def bytes_moved(self, case: Case) -> int:
        """Three matrix products forward, four backward: their roof is FLOPs where there are many tokens."""
        size, width = DTYPES[case.dtype].itemsize, case.shape[2]
        adapters = 2 * RANK * width * (self.adapter_dtype or DTYPES[case.dtype]).itemsize
        activation, weight = math.prod(case.shape) * size, width * width * size
        if self.mode == FORWARD:
            return 2 * activation + weight + adapters
        return 5 * activation + 2 * weight + 3 * adapters
