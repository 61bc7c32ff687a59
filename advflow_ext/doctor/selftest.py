"""Every op once, forward and gradient, against the float64 reference: small tensors, seconds for all."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from advflow_ext import _native
from advflow_ext.bench.harness.registry import DTYPES, OURS, Case
from advflow_ext.bench.ops.block import FORWARD, Block
from advflow_ext.bench.ops.blocks import BLOCKS
from advflow_ext.doctor import every_op
from advflow_ext.kernels import triton_ops
from advflow_ext.testing.compare import UNIT_ROUNDOFF, relative_error

LATENTS = (3, 4, 9, 7)
TOKENS = (2, 10, 128)  # of a transformer block: samples, image tokens, width
TRIED = ("fp32", "bf16")
ALLOWED = 1e-5  # beside one rounding: results in float32 are within 1e-6, and cancel in sums of a few elements


@dataclass(frozen=True)
class Trial:
    op: str
    device: str
    dtype: str
    by: str  # what computed it: native, Triton or reference
    error: float  # the largest of all results and gradients, relative by norm; NaN where something is not finite
    allowed: float
    problem: str = ""  # the exception, where there was one

    @property
    def right(self) -> bool:
        return not self.problem and self.error <= self.allowed  # NaN is wrong


def trials(devices: tuple[str, ...]) -> Iterator[Trial]:
    for device in devices:
        for name in every_op.NAMES:
            for dtype in TRIED:
                yield tried(name, device, dtype, _latents_by, _of_latents)
        for name, block in BLOCKS.items():
            # Forward is the first half of the others.
            for dtype in TRIED if block.mode != FORWARD else ():
                yield tried(name, device, dtype, _block_by, _of_block)


Compared = tuple[float, float]  # error, allowed


def tried(
    name: str, device: str, dtype: str, by: Callable[[str, str, bool], str], op: Callable[[str, str, str], Compared]
) -> Trial:
    if _native.module is not None:
        _native.module.reset_launch_count()
    try:
        error, allowed = op(name, device, dtype)
    except Exception as exception:  # whatever it is, the other ops are still to be tried
        sentence = (str(exception).splitlines() or [""])[0]
        return Trial(name, device, dtype, "", math.nan, 0.0, f"{type(exception).__name__}: {sentence}")
    launched = _native.module is not None and _native.module.launch_count() > 0
    return Trial(name, device, dtype, by(name, device, launched), error, allowed)


def _latents_by(name: str, device: str, launched: bool) -> str:
    return "native" if launched else "reference"


def _block_by(name: str, device: str, launched: bool) -> str:
    if name.startswith("lora_linear"):
        return "PyTorch"  # GEMMs are torch's, with a gradient of ours
    return "Triton" if triton_ops.serves(torch.empty(1, device=device)) else "reference"


def _of_latents(name: str, device: str, dtype: str) -> Compared:
    inputs = every_op.Drawing(LATENTS, DTYPES[dtype], device).inputs(name)
    found, exact = every_op.run(name, inputs), every_op.truth(name, inputs)
    if name == "sde_step" and dtype != "fp32":
        found = {"x_next": found["x_next"]}  # eps and its density are those of the rounded next x
    rounding = 0.0 if dtype == "fp32" else UNIT_ROUNDOFF[DTYPES[dtype]]
    return max(relative(found[key], exact[key]) for key in found), ALLOWED + rounding


def relative(found: Tensor, exact: Tensor) -> float:
    error = relative_error(found.cpu(), exact)
    return error if math.isfinite(error) else math.inf  # NaN would be lost in a maximum


def _of_block(name: str, device: str, dtype: str) -> Compared:
    block: Block = BLOCKS[name]
    case = Case(name, TOKENS, dtype, None)
    arguments = block.arguments(case, torch.device(device), 0)
    result = block.run(block.functions()[OURS], arguments)
    check = block.check(case, arguments, block.truth(arguments), result, OURS)
    # As above: of parameters' gradients and of everything else.
    return max(error if math.isfinite(error) else math.inf for error in (check.numbers_error, check.latents_error)), (
        check.latents_limit
    )
