"""The log-probability of a stored transition, and the noise it was made with, in plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from advflow_ext.contract import checks, transitions
from advflow_ext.contract.batches import any_batch
from advflow_ext.contract.step_table import StepRows, StepTable
from advflow_ext.reference._forward import mean


def transition_arguments(v: Tensor, x: Tensor, x_next: Tensor, table: StepTable, index: int | Tensor) -> StepRows:
    """The coefficients, one row a transition, in the accumulate dtype."""
    dtype = checks.require_latents(v, x=x, x_next=x_next)
    steps = transitions.checked_steps(v, table, index, stochastic=False)
    return table.rows(steps, dtype)


@any_batch
def transition_log_prob(
    v: Tensor, x: Tensor, x_next: Tensor, table: StepTable, index: int | Tensor, *, variance: bool = True
) -> Tensor:
    """Same arguments, result and errors as :func:`advflow_ext.transition_log_prob`, by PyTorch autograd."""
    checks.require_flag("variance", variance)
    return log_prob_of_rows(v, x, x_next, transition_arguments(v, x, x_next, table, index)[:3], variance)


def log_prob_of_rows(v: Tensor, x: Tensor, x_next: Tensor, rows: Sequence[Tensor], variance: bool) -> Tensor:
    """The same from c_x, c_v and sigma, ``[N]`` in the accumulate dtype."""
    sigma = rows[2]
    deviation = deviation_between(v, x.detach(), x_next.detach(), rows)
    with torch.no_grad():
        values = log_density(deviation, sigma, variance)
    # The mask sits at the entrance: the backward of `where` writes exact zeros there, whatever is infinite behind it.
    usable = torch.isfinite(values) & (sigma != 0)
    deviation = torch.where(usable.view(-1, *[1] * (v.dim() - 1)), deviation, 0)
    return torch.where(usable, log_density(deviation, sigma, variance), values)


@any_batch
@torch.no_grad()
def transition_noise(v_old: Tensor, x: Tensor, x_next: Tensor, table: StepTable, index: int | Tensor) -> Tensor:
    """Same arguments, result and errors as :func:`advflow_ext.transition_noise`."""
    step = transition_arguments(v_old, x, x_next, table, index)
    return noise_of(deviation_between(v_old, x, x_next, step[:3]), step.sigma)


@any_batch
@torch.no_grad()
def from_means(
    means: Tensor, x: Tensor, x_next: Tensor, table: StepTable, index: int | Tensor
) -> tuple[Tensor, Tensor]:
    """Same arguments, result and errors as :func:`advflow_ext.from_means`."""
    checks.require_latent("means", means)
    for name, latent in (("x", x), ("x_next", x_next)):
        checks.require_like("means", name, latent, means)
    steps = transitions.checked_steps(means, table, index, stochastic=False)
    dtype = checks.accumulate_dtype(means, x, x_next)
    columns = table.columns(steps, torch.float64)[:, :3].unbind(1)
    c_x, c_v, sigma = (column.view(-1, *[1] * (means.dim() - 1)) for column in columns)
    wide = means.double()
    v_old = (wide - c_x * x.double()) / c_v
    eps = torch.where(sigma == 0, 0, x_next.double() - wide) / torch.where(sigma == 0, 1, sigma)
    return v_old.to(dtype), eps.to(dtype)


def deviation_between(v: Tensor, x: Tensor, x_next: Tensor, rows: Sequence[Tensor]) -> Tensor:
    """x_next - mean in the dtype of ``rows``, 0 of a deterministic step.

    In this order what is rounded before v joins cancels in the difference of two log-probabilities.
    """
    c_x, c_v, sigma = (column.view(-1, *[1] * (v.dim() - 1)) for column in rows)
    deviation = x_next.to(sigma.dtype) - c_x * x.to(sigma.dtype) - c_v * v.to(sigma.dtype)
    return torch.where(sigma == 0, 0, deviation)


def noise_of(deviation: Tensor, sigma: Tensor) -> Tensor:
    """The deviation over sigma ``[N]``, 0 of a deterministic step."""
    return deviation / torch.where(sigma == 0, 1, sigma).view(-1, *[1] * (deviation.dim() - 1))


def log_density(deviation: Tensor, sigma: Tensor, variance: bool = True) -> Tensor:
    """``[N]`` in float64, averaged over the elements; 0 of a deterministic step."""
    return log_density_of_mean_square(mean(deviation.flatten(1).double().square()), sigma, variance)


def log_density_of_mean_square(deviation_sq: Tensor, sigma: Tensor, variance: bool = True) -> Tensor:
    """The same of the mean square, float64."""
    if not variance:
        return torch.where(sigma == 0, 0, -deviation_sq)
    wide = sigma.double()
    density = -deviation_sq / (2 * wide.square()) - wide.log() - math.log(2 * math.pi) / 2
    return torch.where(sigma == 0, 0, density)
