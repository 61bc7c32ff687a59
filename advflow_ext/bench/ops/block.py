"""An op of SD3.5's transformer blocks in one mode: its inputs, its implementations, what they are held to."""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from advflow_ext.bench.harness.registry import (
    DTYPES,
    MAX_AUTOTUNE,
    OURS,
    Arguments,
    Case,
    Check,
    Implementation,
    Result,
    Shape,
)
from advflow_ext.bench.ops.losses import AUTOTUNE, generator

HEAD_DIM = 64
EPS = 1e-6
LIGER, QUACK = "liger", "quack"
LIBRARIES = {LIGER: "liger_kernel", QUACK: "quack"}  # rows of libraries that need not be there, and their modules

FORWARD, FROZEN, TRAINED = "forward", "frozen", "trained"

# Of the error beside roundings to half precision: sums of up to 1536 terms in float32. How many roundings: ours rounds
# each result once, and starts its backward pass from a rounded input; stock modules round up to four times in a row.
ALLOWED = 1e-5
ROUNDINGS = {OURS: 1, "baseline": 4}

Tensors = Sequence[Tensor]
Function = Callable[[Tensors, Tensors], tuple[Tensor, ...]]  # of activations and parameters


def shape_obstacle(shape: Shape) -> str | None:
    """Why the ops of a block cannot have this shape, as a sentence."""
    if len(shape) == 3 and shape[2] % HEAD_DIM == 0:
        return None
    given = "x".join(map(str, shape))
    return f"shape {given}: accepted for the ops of a block is batch x tokens x width, the width a multiple of 64."


def is_installed(row: str) -> bool:
    """Whether the library of a row of :data:`LIBRARIES` can be imported."""
    return importlib.util.find_spec(LIBRARIES[row]) is not None


def can_run(row: str, device: torch.device) -> bool:
    """QuACK has no other kernels than CUDA's."""
    return is_installed(row) and (row != QUACK or device.type == "cuda")


class Block:
    """One function of ``advflow_ext.nn`` in one mode."""

    shapes: list[Shape] = [(4, 1024, 1536)]
    refs: tuple[bool | None, ...] = (None,)
    source: str | None = None

    def __init__(self, mode: str) -> None:
        self.mode = mode

    def activation_shapes(self, shape: Shape) -> list[Shape]:
        """Of the inputs, which always ask for gradients."""
        raise NotImplementedError

    def parameters(self, shape: Shape, normal: Callable[..., Tensor]) -> list[Tensor]:
        """What is frozen or trained; ``normal(*sizes, dtype=None)`` draws in the dtype of the case."""
        raise NotImplementedError

    def result_shapes(self, shape: Shape) -> list[Shape]:
        raise NotImplementedError

    def functions(self) -> dict[str, Function]:
        """Ours and the baselines that are not compiled."""
        raise NotImplementedError

    def bytes_moved(self, case: Case) -> int:
        raise NotImplementedError

    def arguments(self, case: Case, device: torch.device, seed: int) -> Arguments:
        random = generator(device, seed)

        def normal(*sizes: int, dtype: torch.dtype | None = None) -> Tensor:
            return torch.randn(sizes, generator=random, device=device).to(dtype or DTYPES[case.dtype])

        activations = [normal(*sizes) for sizes in self.activation_shapes(case.shape)]
        parameters = self.parameters(case.shape, normal)
        incoming: list[Tensor] = []
        if self.mode != FORWARD:
            incoming = [normal(*sizes) for sizes in self.result_shapes(case.shape)]
            for activation in activations:
                activation.requires_grad_()
        if self.mode == TRAINED:
            self.train(parameters)
        call = {f"activation {i}": tensor for i, tensor in enumerate(activations)}
        call |= {f"parameter {i}": tensor for i, tensor in enumerate(parameters)}
        return Arguments(call, incoming=tuple(incoming))

    def train(self, parameters: Tensors) -> None:
        for parameter in parameters:
            parameter.requires_grad_()

    def implementations(self, device: torch.device) -> dict[str, Implementation]:
        functions = self.functions()
        eager = functions["eager"]
        functions["compile"] = torch.compile(eager, dynamic=False)
        if device.type == "cuda":
            functions[MAX_AUTOTUNE] = torch.compile(eager, dynamic=False, mode=AUTOTUNE)
        for row in LIBRARIES:
            if row in functions and not can_run(row, device):
                functions.pop(row)
        return {
            name: Implementation(functools.partial(self.run, function), OURS if name == OURS else "baseline")
            for name, function in functions.items()
        }

    def run(self, function: Function, arguments: Arguments) -> Result:
        """Results, then gradients of what asks for one: of activations, then of parameters."""
        activations, parameters = operands(arguments.call)
        if self.mode == FORWARD:
            with torch.no_grad():
                return function(activations, parameters)
        results = function(activations, parameters)
        wanted = [tensor for tensor in (*activations, *parameters) if tensor.requires_grad]
        return *(result.detach() for result in results), *torch.autograd.grad(results, wanted, arguments.incoming)

    def truth(self, arguments: Arguments) -> Result:
        call = {
            name: tensor.detach().double().requires_grad_(tensor.requires_grad)
            for name, tensor in arguments.call.items()
        }
        wide = Arguments(call, incoming=tuple(grad.double() for grad in arguments.incoming))
        return self.run(self.functions()["eager"], wide)

    def check(self, case: Case, arguments: Arguments, truth: Result, result: Result, standard: str) -> Check:
        """``numbers`` are the gradients of parameters, ``latents`` everything else; the worst tensor counts."""
        errors = [
            float((mine.detach().double() - exact).norm() / exact.norm().clamp(min=1e-300))
            for mine, exact in zip(result, truth, strict=True)
        ]
        of_parameters = sum(tensor.requires_grad for tensor in operands(arguments.call)[1])
        latents, numbers = errors[: len(errors) - of_parameters], errors[len(errors) - of_parameters :]
        dtype = DTYPES[case.dtype]
        rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
        limit = ALLOWED + ROUNDINGS[standard] * rounding
        return Check(worst(numbers), worst(latents), limit, limit)


def worst(errors: list[float]) -> float:
    """The largest, NaN above all."""
    return max(errors, key=lambda error: math.inf if math.isnan(error) else error, default=0.0)


def operands(call: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Activations and parameters."""
    activations = [tensor for name, tensor in call.items() if name.startswith("activation")]
    return activations, list(call.values())[len(activations) :]
