"""What a call dispatches: PyTorch operators, and reads that would wait for a device."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

_READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2", "unique_dim")


class Count(TorchDispatchMode):
    """``large`` operators, which read or write as much as a batch, ``small`` ones, and ``reads``; views are free."""

    def __init__(self, large: int) -> None:
        super().__init__()
        self.threshold, self.large, self.small, self.reads = large, 0, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.name().split("::")[1].split(".")[0]
        if name in _READS:
            self.reads += 1
        elif not func.is_view and name != "detach":
            outputs = result if isinstance(result, tuple | list) else (result,)
            read = () if name.startswith("new_") else args
            sizes = [each.numel() for each in (*outputs, *read) if isinstance(each, torch.Tensor)]
            if max(sizes, default=0) >= self.threshold:
                self.large += 1
            else:
                self.small += 1
        return result

    def __repr__(self) -> str:
        return f"{self.large} large operators, {self.small} small ones, {self.reads} reads"


def as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes the branch of ours that does not look at values, as a GPU does."""
    for name, module in list(sys.modules.items()):
        if name.startswith("advflow_ext") and hasattr(module, "values_are_at_hand"):
            monkeypatch.setattr(module, "values_are_at_hand", lambda tensor: False)
