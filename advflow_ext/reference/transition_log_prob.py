"""The log-probability of a stored transition, and the noise it was made with, in plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from advflow_ext.contract import checks, transitions
from advflow_ext.contract.step_table import StepRows, StepTable
from advflow_ext.reference._forward import mean


def transition_arguments(v: Tensor, x: Tensor, x_next: Tensor, table: StepTable, index: int | Tensor) -> StepRows:
    """The coefficients, one row a transition, in the accumulate dtype."""
    dtype = checks.require_latents(v, x=x, x_next=x_next)
    steps = transitions.checked_steps(v, table, index, stochastic=False)
    return table.rows(steps, dtype)


def transition_log_prob(
    v: Tensor, x: Tensor, x_next: Tensor, table: StepTable, index: int | Tensor, *, variance: bool = True
) -> Tensor:
    """Same arguments, result and errors as :func:`advflow_ext.transition_log_prob`, by PyTorch autograd."""
    checks.require_flag("variance", variance)
    return log_prob_of_rows(v, x, x_next, transition_arguments(v, x, x_next, table, index)[:3], variance)


def log_prob_of_rows(v: Tensor, x: Tensor, x_next: Tensor, rows: Sequence[Tensor], variance: bool) -> Tensor:
    """The same from c_x, c_v and sigma, ``[N]`` in the accumulate dtype."""
    sigma = rows[2]
    eps = noise_between(v, x.detach(), x_next.detach(), rows)
    with torch.no_grad():
        values = log_density(eps, sigma, variance)
    # The mask sits at the entrance: the backward of `where` writes exact zeros there, whatever is infinite behind it.
    usable = torch.isfinite(values) & (sigma != 0)
    eps = torch.where(usable.view(-1, *[1] * (v.dim() - 1)), eps, 0)
    return torch.where(usable, log_density(eps, sigma, variance), values)


@torch.no_grad()
def transition_noise(v_old: Tensor, x: Tensor, x_next: Tensor, table: StepTable, index: int | Tensor) -> Tensor:
    """Same arguments, result and errors as :func:`advflow_ext.transition_noise`."""
    return noise_between(v_old, x, x_next, transition_arguments(v_old, x, x_next, table, index))


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


def noise_between(v: Tensor, x: Tensor, x_next: Tensor, rows: Sequence[Tensor]) -> Tensor:
    """eps in the dtype of ``rows``, 0 of a deterministic step."""
    c_x, c_v, sigma = (column.view(-1, *[1] * (v.dim() - 1)) for column in rows[:3])
    silent = sigma == 0
    drawn = x_next.to(sigma.dtype) - (c_x * x.to(sigma.dtype) + c_v * v.to(sigma.dtype))
    return torch.where(silent, 0, torch.where(silent, 0, drawn) / torch.where(silent, 1, sigma))


def log_density(eps: Tensor, sigma: Tensor, variance: bool = True) -> Tensor:
    """``[N]`` in float64 from the noise, averaged over its elements; 0 of a deterministic step."""
    return log_density_of_mean_square(mean(eps.flatten(1).double().square()), sigma, variance)


def log_density_of_mean_square(eps_sq: Tensor, sigma: Tensor, variance: bool = True) -> Tensor:
    """The same of <eps^2>, float64."""
    wide = sigma.double()
    density = -eps_sq / 2 - wide.log() - math.log(2 * math.pi) / 2 if variance else -eps_sq * wide.square()
    return torch.where(sigma == 0, 0, density)
