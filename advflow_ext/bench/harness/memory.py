"""Peak memory a call needs beyond what exists when it starts (its result, the gradient, included)."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch.profiler import ProfilerActivity, profile


def peak_of(changes: Iterable[int]) -> int:
    """Highest running total of allocations (positive) and frees (negative)."""
    total = peak = 0
    for change in changes:
        total += change
        peak = max(peak, total)
    return peak


def _let_go(device: torch.device) -> None:
    """Autograd's thread of a device drops what the last backward pass left it before it begins another."""
    torch.zeros((), device=device, requires_grad=True).sum().backward()


def peak_extra_bytes(call: Callable[[], object], device: torch.device) -> int:
    call()
    if device.type == "cuda":
        _let_go(device)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        # Held to the end of the block, or its release would be taken for a release of something older.
        result = call()
    del result
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return peak_of(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
