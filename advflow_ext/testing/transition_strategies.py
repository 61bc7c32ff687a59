"""Hypothesis strategies for batches of sampler steps: any rank, shape, layout, mixture of dtypes, schedule and step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from advflow_ext.contract.step_table import StepTable
from advflow_ext.testing.layouts import LAYOUTS, arrange
from advflow_ext.testing.strategies import HALVES_AND_FLOAT, shapes


def shifted(steps: int, shift: float = 3.0) -> Tensor:
    """The single-shift schedule: shift s / (1 + (shift - 1) s) of equally spaced s."""
    s = torch.linspace(1, 0, steps + 1, dtype=torch.float64, device="cpu")
    return shift * s / (1 + (shift - 1) * s)


TABLES = (
    StepTable(shifted(10), noise_level=0.7),
    StepTable(shifted(10), noise_level=0.8, convention="clamp_0.99", stochastic_steps=(0, 1, 4)),
    StepTable(shifted(16), sampler="dance_sde", noise_level=0.3),
    StepTable(shifted(10), sampler="cps", noise_level=0.8),
)
FLASH = StepTable(shifted(20), sampler="flash_sde", noise_level=0.9, stochastic_steps=range(10))
# One step a sample, each with its own noise level; one of them is deterministic.
SCATTERED = StepTable.from_steps(
    [1.0, 0.9, 0.5, 0.9, 0.3], [0.96, 0.8, 0.1, 0.85, 0.25], noise_level=[0.7, 0.4, 0.0, 1.0, 0.2], sigma_1=0.95
)


@dataclass
class TransitionBatch:
    """Arguments of a reverse-process loss; ``v`` is a leaf that requires a gradient."""

    v: Tensor
    v_old: Tensor
    eps: Tensor
    table: StepTable
    index: Tensor
    advantages: Tensor
    options: dict[str, Any] = field(default_factory=dict)

    def arguments(self) -> tuple[Any, ...]:
        return self.v, self.v_old, self.eps, self.table, self.index, self.advantages

    def map(self, change: Any) -> TransitionBatch:
        """Every tensor changed, with v as a new leaf."""

        def of(value: Any) -> Any:
            return change(value.detach()) if isinstance(value, Tensor) else value

        v, v_old, eps, table, index, advantages = (of(value) for value in self.arguments())
        options = {name: of(value) for name, value in self.options.items()}
        return TransitionBatch(v.requires_grad_(), v_old, eps, table, index, advantages, options)

    def to(self, dtype: torch.dtype) -> TransitionBatch:
        """The same rounded numbers in another dtype."""
        return self.map(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)


@st.composite
def transition_batches(
    draw: st.DrawFn, device: str = "cpu", dtypes: tuple[torch.dtype, ...] = HALVES_AND_FLOAT
) -> TransitionBatch:
    shape = draw(shapes())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def normal() -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def stored(values: Tensor) -> Tensor:
        return arrange(values.to(device, draw(st.sampled_from(dtypes))), draw(st.sampled_from(LAYOUTS)))

    drift = draw(st.sampled_from([1e-3, 0.1, 1.0]))
    v_old = normal()
    table = draw(st.sampled_from([*TABLES, FLASH, SCATTERED]))
    steps = torch.tensor(table.stochastic_steps)
    picked = torch.randint(len(steps), shape[:1], generator=generator)
    uniform = 2 * torch.rand(shape[0], generator=generator, dtype=torch.float64) - 1
    with_reference = draw(st.booleans())
    return TransitionBatch(
        v=stored(v_old + drift * normal()).detach().requires_grad_(),
        v_old=stored(v_old),
        eps=stored(normal()),
        table=table,
        index=steps[picked].to(device),
        advantages=uniform.float().to(device),  # float32 first: the truth must see the same numbers
        options={
            "v_ref": stored(v_old + 0.1 * normal()) if with_reference else None,
            "kl_weight": draw(st.sampled_from([0.0, 0.04, 2.0])) if with_reference else 0.0,
            "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
        },
    )
