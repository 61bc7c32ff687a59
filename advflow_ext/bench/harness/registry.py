"""What can be measured: op -> inputs, byte count, implementations, and the fp64 answer they must agree with."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
OURS, COPY, MAX_AUTOTUNE = "ours", "copy", "compile max-autotune"

# What errors are allowed on top of one rounding. A compiler may sum a sample's elements one after the other. Trainers
# subtract fp32 log-probabilities and mix velocities in half precision: theirs show that the formula is the same.
STANDARDS = {"ours": 1e-6, "baseline": 1e-5, "public": 1e-4}

Shape = tuple[int, ...]
# Of losses and samplers two: numbers a sample (or the loss they become), and a tensor of the latents' shape; either may
# be empty. Of a block's op its results and gradients.
Result = tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    op: str
    shape: Shape
    dtype: str
    with_ref: bool | None  # None: the op knows no v_ref

    @property
    def name(self) -> str:
        ref = {None: "", True: " with v_ref", False: " no v_ref"}[self.with_ref]
        return f"{self.op} {'x'.join(map(str, self.shape))} {self.dtype}{ref}"


@dataclass(frozen=True)
class Arguments:
    """``call`` is what our function takes; ``public`` what a public trainer holds instead, of the same transition;
    ``incoming`` the gradients of the results, where a backward pass begins with some."""

    call: dict[str, Any]
    public: dict[str, Any] = field(default_factory=dict)
    incoming: tuple[Tensor, ...] = ()

    @property
    def bytes(self) -> int:
        return sum(value.nbytes for value in self.call.values() if isinstance(value, Tensor))


@dataclass(frozen=True)
class Implementation:
    run: Callable[[Arguments], Result]
    standard: str = "baseline"  # of exactness, one of STANDARDS
    capturable: bool = True  # in a CUDA graph; what reads a number back on the host is not


@dataclass(frozen=True)
class Truth:
    """The float64 answer for the same rounded inputs."""

    numbers: Tensor
    size: Tensor  # mean magnitude of what was added up for the numbers, which may cancel
    latents: Tensor


@dataclass(frozen=True)
class Check:
    """Errors against fp64 on the same rounded inputs, and what is allowed.

    Of a block's op ``numbers`` are the gradients of its parameters, ``latents`` everything else.
    """

    numbers_error: float  # relative to the mean magnitude of what is added up for them
    latents_error: float  # ||x - exact|| / ||exact||: of the gradient, or of the sampler's next x
    numbers_limit: float
    latents_limit: float

    @property
    def green(self) -> bool:
        # Written so that NaN is red.
        return self.numbers_error <= self.numbers_limit and self.latents_error <= self.latents_limit


class Op(Protocol):
    @property
    def shapes(self) -> list[Shape]:
        """Measured where none are asked for."""

    @property
    def refs(self) -> tuple[bool | None, ...]: ...

    @property
    def source(self) -> str | None:
        """Whose formula the public row is, one of conformance's SOURCES."""

    def arguments(self, case: Case, device: torch.device, seed: int) -> Arguments: ...

    def bytes_moved(self, case: Case) -> int: ...

    def implementations(self, device: torch.device) -> dict[str, Implementation]: ...

    def truth(self, arguments: Arguments) -> Any:
        """What ``check`` compares with."""

    def check(self, case: Case, arguments: Arguments, truth: Any, result: Result, standard: str) -> Check: ...


def limits(dtype: torch.dtype, standard: str) -> tuple[float, float]:
    """For numbers and for latents, which are rounded to ``dtype``."""
    allowed = STANDARDS[standard]
    rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    if standard == "public":
        return allowed + 4 * rounding, allowed + 4 * rounding
    return allowed, allowed + rounding


def compare(dtype: torch.dtype, truth: Truth, result: Result, standard: str) -> Check:
    numbers, latents = (tensor.detach().double() for tensor in result)
    error = (latents - truth.latents).norm() / truth.latents.norm().clamp(min=1e-300)
    largest = (numbers - truth.numbers).abs().amax() if numbers.numel() else numbers.new_zeros(())
    return Check(float(largest / truth.size), float(error), *limits(dtype, standard))


def elements(case: Case) -> int:
    return torch.Size(case.shape).numel()


def latent_bytes(case: Case) -> int:
    return elements(case) * DTYPES[case.dtype].itemsize


def parse_shapes(text: str) -> list[Shape]:
    """``"8x16x64x64,8x1024x64"`` -> [(8, 16, 64, 64), (8, 1024, 64)]."""
    shapes = []
    for item in text.split(","):
        try:
            shape = tuple(int(size) for size in item.strip().split("x"))
        except ValueError:
            shape = ()
        if len(shape) < 2 or min(shape) < 1:
            raise ValueError(f"shape {item.strip()!r}: expected at least two positive sizes joined by x, as 8x16x64x64")
        shapes.append(shape)
    return shapes


def cases(ops: dict[str, Op], shapes: list[Shape] | None, dtypes: list[str], refs: tuple[bool, ...]) -> Iterator[Case]:
    """All combinations; an op that knows no v_ref is measured once whatever ``refs``."""
    for name, op in ops.items():
        for shape in shapes or op.shapes:
            for dtype in dtypes:
                for with_ref in op.refs if op.refs == (None,) else refs:
                    yield Case(name, shape, dtype, with_ref)


def choice_list(allowed: Iterable[str]) -> Callable[[str], list[str]]:
    """What parses an option whose value is comma-separated names."""
    names = list(allowed)

    def parse(text: str) -> list[str]:
        items = [item.strip() for item in text.split(",")]
        for item in items:
            if item not in names:
                raise argparse.ArgumentTypeError(f"{item!r}: choose from {', '.join(names)}")
        return items

    return parse
