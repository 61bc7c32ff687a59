"""One step of a sampler in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from advflow_ext.contract import checks, transitions
from advflow_ext.contract.batches import any_batch
from advflow_ext.contract.outputs import SdeStep
from advflow_ext.contract.step_table import StepRows, StepTable
from advflow_ext.reference.transition_log_prob import deviation_between, log_density, noise_of


def sde_step_arguments(
    v: Tensor,
    x: Tensor,
    table: StepTable,
    index: int | Tensor,
    noise: Tensor | None,
    generator: torch.Generator | None,
    dtype: torch.dtype | None,
) -> tuple[StepRows, torch.dtype]:
    """The coefficients, one row a sample, and the dtype of the next x."""
    checks.require_latent("v", v)
    checks.require_like_v("x", x, v)
    if noise is not None:
        checks.require_like_v("noise", noise, v)
    if generator is not None:
        if not isinstance(generator, torch.Generator):
            raise ValueError(f"generator is a {type(generator).__name__}; accepted are a torch.Generator and None.")
        if noise is not None:
            raise ValueError("generator is given beside noise; accepted is one of them, or neither.")
        if generator.device.type != v.device.type:
            raise ValueError(f"generator is on {generator.device}; accepted is the device of v, {v.device}.")
    if dtype is not None and dtype not in checks.FLOAT_DTYPES:
        raise ValueError(f"dtype is {dtype!r}; accepted are float32, float16, bfloat16, float64 and None.")
    steps = transitions.checked_steps(v, table, index, stochastic=False)
    dtype = dtype or x.dtype
    accumulate = torch.float64 if dtype == torch.float64 else checks.accumulate_dtype(v, x, noise)
    return table.rows(steps, accumulate), dtype


@any_batch
@torch.no_grad()
def sde_step(
    v: Tensor,
    x: Tensor,
    table: StepTable,
    index: int | Tensor,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> SdeStep:
    """Same arguments, result and errors as :func:`advflow_ext.sde_step`.

    Noise that is not given is ``torch.randn``'s: other numbers than the native op makes, and dependent on the batch.
    """
    step, dtype = sde_step_arguments(v, x, table, index, noise, generator, dtype)
    accumulate = step.sigma.dtype
    if noise is None:
        noise = torch.randn(v.shape, generator=generator, dtype=accumulate, device=v.device)
    return step_of_rows(v, x, step[:3], noise, dtype)


def step_of_rows(
    v: Tensor, x: Tensor, rows: Sequence[Tensor], noise: Tensor, dtype: torch.dtype, variance: bool = True
) -> SdeStep:
    """The same from c_x, c_v and sigma, ``[N]`` in the accumulate dtype."""
    accumulate = rows[2].dtype
    c_x, c_v, sigma = (column.view(-1, *[1] * (v.dim() - 1)) for column in rows)
    mean = c_x * x.to(accumulate) + c_v * v.to(accumulate)
    x_next = (mean + sigma * noise.to(accumulate)).to(dtype)
    deviation = deviation_between(v, x, x_next, rows)
    return SdeStep(x_next, noise_of(deviation, rows[2]), log_density(deviation, rows[2], variance))
