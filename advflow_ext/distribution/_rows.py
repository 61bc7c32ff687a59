"""What a batch of features is, and sums over the ranks that share one."""

from __future__ import annotations

import torch
from torch import Tensor, distributed

from advflow_ext.contract.checks import require_float_tensor
from advflow_ext.contract.ranks import exchange_device

# Of a row's squares together. Far beyond any feature; what is more would drown or overflow every sum it is in.
_MOST = torch.finfo(torch.float32).max


def require_features(name: str, value: object, width: int | None = None, device: torch.device | None = None) -> None:
    """Refuses what is not ``[N, d]``; of ``width`` d and on ``device`` where they are given."""
    require_float_tensor(name, value)
    assert isinstance(value, Tensor)
    if value.dim() != 2 or not value.shape[1] or width not in (None, value.shape[1]):
        accepted = (
            "[N, d], one row an image" if width is None else f"[N, {width}], as the reference has {width} features"
        )
        raise ValueError(f"{name} has shape {list(value.shape)}; accepted is {accepted}.")
    if device is not None and value.device != device:
        raise ValueError(f"{name} is on {value.device}; accepted is the device of the reference, {device}.")


def finite_rows(features: Tensor) -> tuple[Tensor, Tensor]:
    """The features in float64 with zeros for rows that are not finite, and which are, ``[N, 1]``.

    A row whose squares add up to more than float32 holds is not finite.
    """
    rows = features.detach().double()
    finite = rows.square().sum(1, keepdim=True) <= _MOST
    return torch.where(finite, rows, 0), finite


def summed(values: Tensor, group: distributed.ProcessGroup | None) -> Tensor:
    """The sum over the ranks of ``group`` (None: of all there are), the same bits on each."""
    if not distributed.is_available() or not distributed.is_initialized():
        return values
    near = values.to(exchange_device(group, values.device)).clone()
    distributed.all_reduce(near, group=group)
    return near.to(values.device)
