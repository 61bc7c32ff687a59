"""One step of a sampler in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from advflow_ext.ops._outputs import SdeStep
from advflow_ext.ops._transition_checks import sde_step_arguments
from advflow_ext.ops.step_table import StepTable
from advflow_ext.reference._reverse import log_prob


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
    c_x, c_v, sigma = (column.view(-1, *[1] * (v.dim() - 1)) for column in step[:3])

    mean = c_x * x.to(accumulate) + c_v * v.to(accumulate)
    x_next = (mean + sigma * noise.to(accumulate)).to(dtype)
    eps = torch.where(sigma == 0, 0, (x_next.to(accumulate) - mean) / sigma)
    scored = log_prob(x_next.to(accumulate).flatten(1), mean.flatten(1), sigma.flatten(1))
    return SdeStep(x_next, eps.to(dtype), torch.where(step.sigma == 0, 0, scored))
