"""How far a policy is from itself when it is run in two ways."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor

from advflow_ext.contract.step_table import StepTable


class Mismatch(NamedTuple):
    """How far one policy is from itself when it is run in two ways.

    ``velocity`` is the largest |v_rollout - v_training| of an element; ``log_ratio`` the largest |log-ratio|,
    mean-reduced over a sample's elements as in the losses, which a trust region would take for a change of the policy.
    """

    velocity: float
    log_ratio: float


def measured(
    rollout: AbstractContextManager[None],
    training: AbstractContextManager[None],
    velocity: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    *,
    rollout_batch: int,
    train_batch: int,
    table: StepTable,
    index: Tensor,
    eps: Tensor | None,
) -> Mismatch:
    """:meth:`PolicySet.mismatch` of what is in force inside ``rollout`` and inside ``training``."""
    for name, value in {"rollout_batch": rollout_batch, "train_batch": train_batch}.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value!r}; accepted is a positive integer.")
    if not inputs or any(tensor.shape[:1] != inputs[0].shape[:1] for tensor in inputs):
        shapes = [list(tensor.shape) for tensor in inputs]
        raise ValueError(f"inputs have the shapes {shapes}; accepted are tensors with one number of rows.")
    wrong = sorted(set(index.tolist()) - set(table.stochastic_steps))
    if wrong or index.shape != inputs[0].shape[:1]:
        raise ValueError(
            f"index has shape {list(index.shape)} and the steps {wrong or 'accepted'}; accepted are "
            f"{len(inputs[0])} of the stochastic steps {list(table.stochastic_steps)}."
        )

    def run(batch: int) -> Tensor:
        parts = zip(*(tensor.split(batch) for tensor in inputs), strict=True)
        return torch.cat([velocity(*part).detach().float() for part in parts])

    with torch.no_grad(), rollout:
        rolled_out = run(rollout_batch)
    with torch.enable_grad(), training:
        trained = run(train_batch)
    delta = (trained - rolled_out).flatten(1)
    if eps is None:
        eps = torch.randn(delta.shape, generator=torch.Generator().manual_seed(0)).to(delta)
    kappa = table.rows(index).kappa[:, None]
    log_ratio = (kappa * delta * (eps.flatten(1).float() - kappa * delta / 2)).mean(1)
    return Mismatch(delta.abs().max().item(), log_ratio.abs().max().item())
