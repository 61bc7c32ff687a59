"""Where the ranks of a process group exchange tensors."""

from __future__ import annotations

import torch
from torch import distributed


def exchange_device(group: distributed.ProcessGroup | None, device: torch.device) -> torch.device:
    """Where ``group`` can exchange what lies on ``device``: there, or on the current device of a kind that it knows.

    Raises ValueError on a rank that is not in the group.
    """
    if distributed.get_rank(group) < 0:
        raise ValueError(
            f"process_group does not hold rank {distributed.get_rank()}, which calls; accepted is a group of which "
            "every rank that calls is a member, or None."
        )
    kinds = [entry.partition(":")[0] for entry in distributed.get_backend_config(group).split(",")]
    return device if device.type in kinds else torch.device(kinds[0])
