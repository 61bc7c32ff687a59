"""The log-probability of a stored transition, with its gradient, and the velocity and noise it was made with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from advflow_ext import _native, reference
from advflow_ext.contract import checks
from advflow_ext.contract.batches import any_batch
from advflow_ext.contract.step_table import StepTable
from advflow_ext.kernels.sde_step import transition_density, transition_deviation_op, transition_deviation_sq_op
from advflow_ext.reference.transition_log_prob import log_density_of_mean_square, transition_arguments


@any_batch
def transition_log_prob(
    v: Tensor, x: Tensor, x_next: Tensor, table: StepTable, index: int | Tensor, *, variance: bool = True
) -> Tensor:
    """The log-probability of the step from x to x_next under the policy, ``[N]`` in float64, with its gradient.

    What a trainer calls that keeps log-probabilities and subtracts them. With D elements, <.> the mean over them::

        d = x_next - c_x x - c_v v
        log_prob = -<d^2> / (2 sigma^2) - ln sigma - ln(2 pi) / 2
        d log_prob / dv = c_v d / (sigma^2 D)

    Of the same transition it has the bits of ``sde_step(...).log_prob``, whatever else is in either batch, so that the
    log-ratio of an unchanged policy is 0 itself. d is computed in float32, in that order, and its squares are added in
    float64: of 65536 elements a difference of two log-probabilities is then off by 3e-10, at worst 1e-9, where float32
    ones leave 1e-7, a tenth of the smallest clips. The losses of this package, which take v_old and eps, are two digits
    better still.

    Arguments:
        v: policy velocity ``[N, ...]`` of any rank from 2, the only tensor that receives a gradient.
        x, x_next: the transition as it is stored, shaped like v, any mix of floating-point dtypes. That x is what v was
            computed from, bit for bit, is up to the trainer.
        table: the rollout's :class:`StepTable`. index: the step of all transitions, or int64 or int32 ``[N]``.
        variance: False for the form of IamCreateAI/FlowCPS, -<(x_next - mean)^2>, without variance and constants.

    A deterministic step has log-probability 0 and no gradient, as trainers want that evaluate through the same call at
    noise level 0. One native launch, and one more for the gradient, which is rounded once, to v's dtype. A transition
    with a non-finite input, and on CUDA and under torch.compile one outside the table, has a non-finite log-probability
    and zero gradient. On CPU, one float64 latent makes eps float64.

    Raises ValueError, naming argument, value and what is accepted, and on CPU for a step outside the table.
    """
    if not _native.serves(v, x, x_next, index):
        return reference.transition_log_prob(v, x, x_next, table, index, variance=variance)
    checks.require_flag("variance", variance)
    return log_prob_of_rows(v, x, x_next, transition_arguments(v, x, x_next, table, index)[:3], variance)


def log_prob_of_rows(v: Tensor, x: Tensor, x_next: Tensor, rows: Sequence[Tensor], variance: bool) -> Tensor:
    """The same from c_x, c_v and sigma, ``[N]`` in the accumulate dtype, for trainers without a table to look into."""
    coef = torch.stack(tuple(rows), 1)
    checks.require_native_dtype(coef.dtype, v, "transition_log_prob")
    values = log_density_of_mean_square(transition_deviation_sq_op(v, x, x_next, coef), rows[2], variance)
    c_v, sigma = rows[1].double(), rows[2].double()
    slope = c_v / sigma.square() if variance else 2 * c_v
    slope = torch.where(torch.isfinite(values) & (sigma != 0), slope, 0)
    return transition_density(v, x, x_next, coef, values, slope)


@any_batch
@torch.no_grad()
def transition_noise(v_old: Tensor, x: Tensor, x_next: Tensor, table: StepTable, index: int | Tensor) -> Tensor:
    """The noise of a stored transition, (x_next - c_x x - c_v v_old) / sigma: what the losses take as ``eps``.

    For a rollout that was not made by :func:`sde_step`, which returns the same bits for its own. x_next is the latent
    as it was stored, after any rounding. Shaped like v_old, in float32 (float64 as soon as a latent is float64 on CPU),
    contiguous, without gradient; 0 for a deterministic step. Arguments and errors as in :func:`transition_log_prob`. A
    trainer that kept means rather than velocities has both in :func:`from_means`.
    """
    if not _native.serves(v_old, x, x_next, index):
        return reference.transition_noise(v_old, x, x_next, table, index)
    step = transition_arguments(v_old, x, x_next, table, index)
    checks.require_native_dtype(step.sigma.dtype, v_old, "transition_noise")
    return transition_deviation_op(v_old, x, x_next, torch.stack(step[:3], 1))


@any_batch
def from_means(
    means: Tensor, x: Tensor, x_next: Tensor, table: StepTable, index: int | Tensor
) -> tuple[Tensor, Tensor]:
    """``(v_old, eps)`` of transitions whose rollout kept means, for the losses, which take those.

    ::

        v_old = (mean - c_x x) / c_v
        eps = (x_next - mean) / sigma

    Plain PyTorch on every device, in float64 inside; returned in float32 (float64 as soon as a latent is float64),
    without gradient. Means in float32 lose nothing that the losses would see. In half precision they have lost the
    velocity: their rounding over c_v is larger than what an update changes. eps is 0 for a deterministic step. Other
    arguments and errors as in :func:`transition_log_prob`.
    """
    return reference.from_means(means, x, x_next, table, index)
