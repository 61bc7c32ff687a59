"""Gates, layer norm and modulation: ours, and as diffusers and other libraries write it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

import advflow_ext as af
from advflow_ext.bench.harness.registry import DTYPES, OURS, Case, Shape
from advflow_ext.bench.ops.block import EPS, FORWARD, LIGER, TRAINED, Block, Function, Tensors


def pairs(tensors: Tensors) -> list[tuple[Tensor, Tensor]]:
    return list(zip(tensors[::2], tensors[1::2], strict=True))


def liger_layer_norm(x: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_layer_norm as norm

    out: Tensor = norm(x, *ones_and_zeros(x.shape[-1], x.dtype, x.device), EPS)
    return out


@functools.cache
def ones_and_zeros(width: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.ones(width, dtype=dtype, device=device), torch.zeros(width, dtype=dtype, device=device)


def torch_layer_norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=EPS)


class AdaLN(Block):
    """Gated ``branches`` joined to a residual, then layer norm with ``modulations``; any of the two may be none."""

    def __init__(self, branches: int, modulations: int, mode: str) -> None:
        super().__init__(mode)
        self.branches, self.modulations = branches, modulations

    def activation_shapes(self, shape: Shape) -> list[Shape]:
        return [shape] * (1 + self.branches)

    def parameters(self, shape: Shape, normal: Callable[..., Tensor]) -> list[Tensor]:
        """Gates, then scale and shift of each modulation: pieces of one projection, as a block's are."""
        count = self.branches + 2 * self.modulations
        return list(normal(shape[0], count * shape[2]).chunk(count, 1))

    def result_shapes(self, shape: Shape) -> list[Shape]:
        return [shape] * ((self.branches > 0) + self.modulations)

    def functions(self) -> dict[str, Function]:
        found: dict[str, Function] = {
            OURS: self.ours,
            "eager": self.diffusers,
            "library": functools.partial(self.by_addcmul, torch_layer_norm),
        }
        if self.modulations:
            found[LIGER] = functools.partial(self.by_addcmul, liger_layer_norm)
        return found

    def ours(self, activations: Tensors, parameters: Tensors) -> tuple[Tensor, ...]:
        residual, *branches = activations
        gated = list(zip(branches, parameters[: self.branches], strict=True))
        modulations = pairs(parameters[self.branches :])
        if not gated:
            return af.nn.layer_norm_modulate(residual, *modulations, eps=EPS)
        if not modulations:
            return (af.nn.gate_residual(residual, *gated),)
        return af.nn.gate_residual_layer_norm_modulate(residual, gated, modulations[0], eps=EPS)

    def diffusers(self, activations: Tensors, parameters: Tensors) -> tuple[Tensor, ...]:
        """As JointTransformerBlock and its norms write it."""
        h, *branches = activations
        for x, gate in zip(branches, parameters, strict=False):
            h = h + gate.unsqueeze(1) * x
        results = [h] if branches else []
        if self.modulations:
            normed = torch_layer_norm(h)
            for scale, shift in pairs(parameters[self.branches :]):
                results.append(normed * (1 + scale[:, None]) + shift[:, None])
        return tuple(results)

    def by_addcmul(
        self, norm: Callable[[Tensor], Tensor], activations: Tensors, parameters: Tensors
    ) -> tuple[Tensor, ...]:
        """With the fewest launches that PyTorch's own functions allow."""
        h, *branches = activations
        for x, gate in zip(branches, parameters, strict=False):
            h = torch.addcmul(h, gate.unsqueeze(1), x)
        results = [h] if branches else []
        if self.modulations:
            normed = norm(h)
            for scale, shift in pairs(parameters[self.branches :]):
                results.append(torch.addcmul(shift[:, None], normed, 1 + scale[:, None]))
        return tuple(results)

    def bytes_moved(self, case: Case) -> int:
        """Each activation, result and gradient once, and what is normalised again for its gradient."""
        gates, norms = self.branches, self.modulations
        passes = 1 + gates + (gates > 0) + norms
        if self.mode != FORWARD:
            passes += (gates > 0) + norms + 2 * (norms > 0) + gates
        if self.mode == TRAINED:
            passes += gates
        return passes * math.prod(case.shape) * DTYPES[case.dtype].itemsize
