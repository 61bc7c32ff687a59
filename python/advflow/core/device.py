"""Where a run computes."""

from __future__ import annotations

import torch


def pick_device(name: str) -> torch.device:
    """The device called `name`; "auto" is cuda where there is one, else cpu. Raises ValueError where there is none."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f'device is {name!r}; accepted: "auto", "cpu", "cuda" or "cuda:N"')
    usable = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= usable:
        raise ValueError(f"device is {name!r}, and torch {torch.__version__} finds {usable} usable CUDA devices here")
    return device
