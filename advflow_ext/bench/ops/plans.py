"""Which cases are measured where nobody names them: every op once, or many sizes, the most wanted first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from advflow_ext.bench.harness.registry import MAX_AUTOTUNE, Case, Op, Shape, cases
from advflow_ext.bench.ops.block import FORWARD, FROZEN, TRAINED, shape_obstacle
from advflow_ext.bench.ops.blocks import BLOCKS
from advflow_ext.bench.ops.densities import DENSITIES
from advflow_ext.bench.ops.kernels import KERNELS, SdeStep
from advflow_ext.bench.ops.losses import LOSSES, TRAINING
from advflow_ext.kernels import triton_ops

LATENT_OPS: dict[str, Op] = {**{loss.name: loss for loss in LOSSES}, "sde_step": SdeStep(), **DENSITIES}
OPS: dict[str, Op] = {**LATENT_OPS, **KERNELS, **BLOCKS}

SWEPT = ("advantage_flow_loss", "flow_grpo_loss", "sde_step")
LARGE: Shape = (256, 16, 64, 64)
SIZES: tuple[Shape, ...] = (
    *((batch, 16, 64, 64) for batch in (1, 16, 32, 64, 128)),
    (64, 16, 128, 128),
    (1, 16, 21, 90, 160),  # a video
)
BEYOND: Shape = (512, 16, 64, 64)  # where one read of a kernel's tensors in half precision passes 256 MB
# SD3.5 Medium at 512 pixels, 1024 image tokens, and at 1024.
TRAINED_BLOCK: Shape = (9, 1024, 1536)
BLOCK_SIZES: tuple[Shape, ...] = (*((batch, 1024, 1536) for batch in (1, 4, 16)), (4, 4096, 1536))


# Compiling takes longer than everything else, and the kind that tries variants the longest.
TUNED = frozenset({MAX_AUTOTUNE})
COMPILED = TUNED | {"compile", "plain compile"}


@dataclass(frozen=True)
class Planned:
    case: Case
    without: frozenset[str] = frozenset()  # implementations


def chosen(names: tuple[str, ...]) -> dict[str, Op]:
    return {name: OPS[name] for name in names}


def of_mode(mode: str) -> dict[str, Op]:
    return {name: block for name, block in BLOCKS.items() if block.mode == mode}


def adapters() -> dict[str, Op]:
    return {name: op for name, op in of_mode(TRAINED).items() if name.startswith("lora_linear")}


def user_plan(device: torch.device, shapes: list[Shape] | None) -> Iterator[Planned]:
    """Every op that a trainer calls once, in the dtype that is trained in there: minutes.

    The ops of a block have kernels of ours on a GPU alone; those of other shapes than the given ones are left out.
    """
    dtype = "bf16" if device.type == "cuda" else "fp32"
    blocks = {**of_mode(FROZEN), **adapters()} if triton_ops.serves(torch.empty(1, device=device)) else {}
    fitting = {name: op for name, op in blocks.items() if not any(map(shape_obstacle, shapes or []))}
    for case in cases({**LATENT_OPS, **fitting}, shapes, [dtype], (False,)):
        if shapes or case.shape == OPS[case.op].shapes[0]:
            yield Planned(case, TUNED)


def cpu_plan() -> Iterator[Planned]:
    """One loss in its three shapes: minutes on two cores."""
    for case in cases(chosen(("advantage_flow_loss",)), None, ["fp32", "bf16"], (False, True)):
        yield Planned(case)


def gpu_plan() -> Iterator[Planned]:
    """Everything at the training size, then some of it over all sizes, all with v_ref: about eight minutes."""
    ref, sizes = (True,), list(SIZES)
    kernels, swept = chosen(tuple(KERNELS)), chosen(SWEPT)
    others = {name: op for name, op in OPS.items() if name not in kernels | swept | BLOCKS}
    forward, frozen, trained = (of_mode(mode) for mode in (FORWARD, FROZEN, TRAINED))
    frozen, trained = frozen | adapters(), {name: op for name, op in trained.items() if name not in adapters()}

    def planned(ops: dict[str, Op], shapes: list[Shape], dtype: str, without: frozenset[str]) -> Iterator[Planned]:
        for case in cases(ops, shapes, [dtype], ref):
            yield Planned(case, without)

    yield from planned(swept | kernels, [TRAINING], "bf16", frozenset())
    yield from planned(frozen | forward, [TRAINED_BLOCK], "bf16", TUNED)
    for dtype in ("bf16", "fp32"):
        yield from planned(kernels, [LARGE, BEYOND], dtype, frozenset())
    yield from planned(frozen | forward, list(BLOCK_SIZES), "bf16", COMPILED)
    yield from planned(trained, [TRAINED_BLOCK], "bf16", TUNED)
    yield from planned(frozen, [TRAINED_BLOCK], "fp32", COMPILED)
    yield from planned(swept, [LARGE], "bf16", frozenset())
    yield from planned(others, [TRAINING], "bf16", TUNED)
    yield from planned(swept, [TRAINING, LARGE], "fp32", TUNED)
    for dtype in ("bf16", "fp32"):
        yield from planned(kernels, sizes, dtype, frozenset())
    yield from planned(swept, sizes, "fp32", COMPILED)
    yield from planned(swept, sizes, "bf16", TUNED)
    yield from planned(kernels, [TRAINING], "fp32", frozenset())
