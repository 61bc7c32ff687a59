"""Transitions of a trainer that holds a sigma and the next one for each sample, rather than a table of steps.

Nothing here waits for the device: what a trainer keeps on it is never read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from advflow_ext import _native
from advflow_ext.kernels.sde_step import transition_deviation_op
from advflow_ext.ops.sde_step import step_of_rows
from advflow_ext.ops.transition_log_prob import log_prob_of_rows
from advflow_ext.reference.sde_step import step_of_rows as reference_step
from advflow_ext.reference.transition_log_prob import deviation_between, noise_of
from advflow_ext.reference.transition_log_prob import log_prob_of_rows as reference_log_prob

Level = float | Tensor


class Rows(NamedTuple):
    """The coefficients of N transitions in float32, all ``[N]``."""

    c_x: Tensor
    c_v: Tensor
    sigma: Tensor


class Steps(NamedTuple):
    """One transition a sample."""

    rows: Rows
    sigma: Tensor  # float64, [] or [N], as dt is
    dt: Tensor
    has_sqrt_dt: bool  # whether the sampler's sigma has a factor sqrt(-dt)

    @property
    def std_dev_t(self) -> Tensor:
        """What trainers call so: sigma without that factor."""
        return self.sigma / (-self.dt).sqrt() if self.has_sqrt_dt else self.sigma


def column(name: str, value: float | Sequence[float] | Tensor, x: Tensor) -> Tensor:
    """A number for all samples or one for each, of any shape, as float64 ``[]`` or ``[N]`` on the device of x."""
    if isinstance(value, Tensor):
        number = value.detach().to(x.device, torch.float64, non_blocking=True)
    elif isinstance(value, (int, float)):
        number = x.new_full((), value, dtype=torch.float64)
    else:
        number = torch.tensor(value, dtype=torch.float64).to(x.device, non_blocking=True)
    if number.numel() not in (1, x.shape[0]):
        raise ValueError(
            f"{name} has shape {list(number.shape)}; accepted are one number and one for each of {x.shape[0]} samples."
        )
    return number.reshape(()) if number.numel() == 1 else number.reshape(-1)


def flow_sde(s: Tensor, s_end: Tensor, level: Level, sigma_1: Level, samples: int) -> Steps:
    """Flow-GRPO's sampler (see :class:`advflow_ext.StepTable`); ``sigma_1`` stands for s where s is 1."""
    return _sde(s, s_end, level * level / 2 / (1 - torch.where(s == 1, sigma_1, s)), samples)


def dance_sde(s: Tensor, s_end: Tensor, level: Level, samples: int) -> Steps:
    """DanceGRPO's; its std_dev_t is the noise level."""
    return _sde(s, s_end, level * level / 2 / s, samples)


def cps(s: Tensor, s_end: Tensor, level: Level, samples: int) -> Steps:
    """Flow-CPS's."""
    angle = level * (math.pi / 2)
    if isinstance(angle, Tensor):
        kept, sigma = s_end * angle.cos(), s_end * angle.sin()
    else:
        kept, sigma = s_end * math.cos(angle), s_end * math.sin(angle)
    c_x = 1 - s_end + kept
    return _steps(c_x, torch.addcmul(kept, s, c_x, value=-1), sigma, s_end - s, samples, has_sqrt_dt=False)


# On a GPU each operator is a launch, however little it computes: these are few.
def _sde(s: Tensor, s_end: Tensor, half_w: Tensor, samples: int) -> Steps:
    """c_x = 1 - w h / 2, c_v = -h (1 + w (1 - s) / 2), sigma = sqrt(w s h)."""
    dt = s_end - s
    half = half_w * dt
    sigma = (half * s * -2).sqrt()
    return _steps(1 + half, torch.addcmul(dt, half, 1 - s), sigma, dt, samples, has_sqrt_dt=True)


def _steps(c_x: Tensor, c_v: Tensor, sigma: Tensor, dt: Tensor, samples: int, *, has_sqrt_dt: bool) -> Steps:
    rows = torch.stack(torch.broadcast_tensors(c_x, c_v, sigma), -1).float().expand(samples, 3)
    return Steps(Rows(*rows.unbind(1)), sigma, dt, has_sqrt_dt)


def mean(v: Tensor, x: Tensor, steps: Steps) -> Tensor:
    """c_x x + c_v v in float32, with its gradient to v."""
    c_x, c_v = (number.view(-1, *[1] * (v.dim() - 1)) for number in steps.rows[:2])
    return torch.addcmul(c_x * x, c_v, v)


def log_prob(v: Tensor, x: Tensor, x_next: Tensor, steps: Steps, *, variance: bool = True) -> Tensor:
    """:func:`advflow_ext.transition_log_prob` of these transitions, ``[N]`` in float64."""
    op = log_prob_of_rows if _native.serves(v, x, x_next) else reference_log_prob
    return op(v, x.detach(), x_next.detach(), steps.rows, variance)


@torch.no_grad()
def noise(v: Tensor, x: Tensor, x_next: Tensor, steps: Steps) -> Tensor:
    """:func:`advflow_ext.transition_noise` of these transitions."""
    if _native.serves(v, x, x_next):
        return transition_deviation_op(v, x, x_next, torch.stack(steps.rows, 1))
    return noise_of(deviation_between(v, x, x_next, steps.rows), steps.rows[2])


def draw(
    v: Tensor, x: Tensor, drawn_noise: Tensor, steps: Steps, dtype: torch.dtype, *, variance: bool = True
) -> tuple[Tensor, Tensor]:
    """The next x in ``dtype`` and its log-probability by :func:`advflow_ext.sde_step`, with the trainer's own noise.

    Both with a gradient where v or x has one, as when somebody differentiates through a rollout.
    """
    with torch.no_grad():
        if _native.serves(v):
            drawn = step_of_rows(v, x, steps.rows, drawn_noise, None, dtype, variance)
        else:
            drawn = reference_step(v, x, steps.rows, drawn_noise, dtype, variance)
    if not (torch.is_grad_enabled() and (v.requires_grad or x.requires_grad)):
        return drawn.x_next, drawn.log_prob
    expected = mean(v, x, steps)
    carried = drawn.x_next + (expected - expected.detach()).to(dtype)
    return carried, log_prob(v, x, drawn.x_next, steps, variance=variance)


def per_sample(number: Tensor, x: Tensor) -> Tensor:
    """As the trainers return it: float32 ``[N, 1, ...]`` like x."""
    return number.float().expand(x.shape[0]).reshape(-1, *[1] * (x.dim() - 1))
