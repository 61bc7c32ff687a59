"""Where a run computes."""

from __future__ import annotations

import torch


def pick_device(name: str, local: int = 0) -> torch.device:
    """The device called `name`; "auto" is cuda where there is one, else cpu. Raises ValueError where there is none.

    Of "auto" and "cuda" process number `local` of a machine that has several takes the GPU of its number.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and local > 0:
        name = f"cuda:{local}"
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
