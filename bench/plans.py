"""Which cases are measured where nobody asks for others, the most wanted first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bench.kernels import KERNELS, SdeStep
from bench.losses import LOSSES, TRAINING
from bench.registry import Case, Op, Shape, cases

OPS: dict[str, Op] = {**{loss.name: loss for loss in LOSSES}, "sde_step": SdeStep(), **KERNELS}

SWEPT = ("advantage_flow_loss", "flow_grpo_loss", "sde_step")
LARGE: Shape = (256, 16, 64, 64)
SIZES: tuple[Shape, ...] = (
    *((batch, 16, 64, 64) for batch in (1, 16, 32, 64, 128)),
    (64, 16, 128, 128),
    (1, 16, 21, 90, 160),  # a video
)
BEYOND: Shape = (512, 16, 64, 64)  # where one read of a kernel's tensors in half precision passes 256 MB


@dataclass(frozen=True)
class Planned:
    case: Case
    # Compiling takes longer than everything else, and this kind the longest.
    max_autotune: bool = True


def chosen(names: tuple[str, ...]) -> dict[str, Op]:
    return {name: OPS[name] for name in names}


def cpu_plan() -> Iterator[Planned]:
    """One loss in its three shapes: minutes on two cores."""
    for case in cases(chosen(("advantage_flow_loss",)), None, ["fp32", "bf16"], (False, True)):
        yield Planned(case)


def gpu_plan() -> Iterator[Planned]:
    """Everything at the training size, then some of it over all sizes, all with v_ref."""
    ref = (True,)
    kernels, swept = chosen(tuple(KERNELS)), chosen(SWEPT)
    yield from map(Planned, cases(OPS, [TRAINING], ["bf16"], ref))
    yield from map(Planned, cases(kernels, [LARGE, BEYOND], ["bf16", "fp32"], ref))
    yield from map(Planned, cases(swept, [LARGE], ["bf16", "fp32"], ref))
    yield from map(Planned, cases(kernels, list(SIZES), ["bf16", "fp32"], ref))
    for dtype in ("bf16", "fp32"):
        for shape in reversed(SIZES):
            for case in cases(swept, [shape], [dtype], ref):
                yield Planned(case, max_autotune=False)
    yield from map(Planned, cases(kernels | swept, [TRAINING], ["fp32"], ref))
