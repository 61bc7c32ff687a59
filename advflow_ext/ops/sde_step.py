"""One step of a sampler, with the noise as the rounded result explains it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from advflow_ext import _native, reference
from advflow_ext.contract import checks
from advflow_ext.contract.batches import any_batch
from advflow_ext.contract.outputs import SdeStep
from advflow_ext.contract.step_table import StepTable
from advflow_ext.kernels.sde_step import sde_step_op
from advflow_ext.reference.sde_step import sde_step_arguments
from advflow_ext.reference.transition_log_prob import log_density_of_mean_square


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
    """x' = c_x x + c_v v + sigma noise, rounded, with the noise and the log-probability of what it was rounded to.

    ::

        mean = c_x x + c_v v
        x_next = round(mean + sigma noise)
        eps = (x_next - mean) / sigma
        log_prob = -<eps^2> / 2 - ln sigma - ln(2 pi) / 2        averaged over the D elements, as in yifan123/flow_grpo

    Rounding comes before scoring, so that training, which sees x_next, sees the same noise: store ``eps`` and v for the
    losses. Rounded later, the log-ratio of an unchanged policy would be off by more than the clips of GRPO-Guard.

    Arguments:
        v, x: velocity and state ``[N, ...]`` of one shape, any rank from 2, any mix of floating-point dtypes.
        table: a :class:`StepTable`. index: the step of all samples, or int64 or int32 ``[N]``.
        noise: standard normal, shaped like v. None: a 64-bit seed a sample is drawn from ``generator`` (v's device;
            None: torch's own) and the kernel makes the noise, which depends on nothing but that seed.
        dtype: of ``x_next``; None: that of x.

    Returns :class:`SdeStep` ``(x_next, eps, log_prob)`` without gradient. ``eps`` is float32 (float64 as soon as a
    latent is float64 on CPU), since rounded to bfloat16 it costs a log-ratio four digits. ``log_prob`` ``[N]`` is
    float64, since trainers subtract it from that of :func:`transition_log_prob`, whose bits it has. A deterministic
    step has eps 0 and log_prob 0.

    Raises ValueError, naming argument, value and what is accepted, and on CPU for a step outside the table; on CUDA and
    under torch.compile such a sample comes back as NaN.
    """
    if not _native.serves(v):
        return reference.sde_step(v, x, table, index, noise, generator, dtype=dtype)
    step, dtype = sde_step_arguments(v, x, table, index, noise, generator, dtype)
    checks.require_native_dtype(step.sigma.dtype, v, "sde_step")
    seed = None
    if noise is None:
        limits = torch.iinfo(torch.int64)
        seed = torch.randint(
            limits.min, limits.max, v.shape[:1], dtype=torch.int64, device=v.device, generator=generator
        )
    return step_of_rows(v, x, step[:3], noise, seed, dtype)


def step_of_rows(
    v: Tensor,
    x: Tensor,
    rows: Sequence[Tensor],
    noise: Tensor | None,
    seed: Tensor | None,
    dtype: torch.dtype,
    variance: bool = True,
) -> SdeStep:
    """The same from c_x, c_v and sigma, ``[N]`` in the accumulate dtype, and one of noise and seeds; ``variance`` as in
    :func:`advflow_ext.transition_log_prob`."""
    x_next, eps, deviation_sq = sde_step_op(v, x, torch.stack(tuple(rows), 1), noise, seed, dtype)
    return SdeStep(x_next, eps, log_density_of_mean_square(deviation_sq, rows[2], variance))
