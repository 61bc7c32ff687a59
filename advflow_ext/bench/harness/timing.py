"""Clocks. All of them take the implementations in turn, so that whatever disturbs the machine disturbs each alike."""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

Call = Callable[[], object]


@dataclass(frozen=True)
class Times:
    """Seconds a call."""

    q20: float
    median: float
    q80: float
    samples: int

    def to_json(self) -> dict[str, Any]:
        # Unsteady: the machine was too busy for a ratio of two medians to mean much.
        return asdict(self) | {"steady": self.q80 <= 1.5 * self.q20}


def quantile(ordered: Sequence[float], q: float) -> float:
    """Linear interpolation between the two nearest of ``ordered``."""
    position = q * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def summarise(samples: Sequence[float]) -> Times:
    ordered = sorted(samples)
    return Times(quantile(ordered, 0.2), quantile(ordered, 0.5), quantile(ordered, 0.8), len(ordered))


def input_sets(bytes_per_set: int, cache_bytes: int, most: int = 256) -> int:
    """How many inputs to rotate through so that none is still in the last-level cache when its turn comes."""
    return max(2, min(most, math.ceil(2 * cache_bytes / max(bytes_per_set, 1)) + 1))


def cache_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    units = {"K": 2**10, "M": 2**20}
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=32 * 2**20)


def once(call: Call, device: torch.device) -> float:
    if device.type == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def round_robin(
    calls: Mapping[str, Sequence[Call]], device: torch.device, rounds: int, warmup: int = 3
) -> dict[str, Times]:
    """``calls[name]`` are the same work on different inputs; each round times one of them for every name."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for i in range(warmup + rounds):
        # Another first each round: what follows a costly neighbour inherits its stalls.
        first = i % max(len(names), 1)
        for name in names[first:] + names[:first]:
            variants = calls[name]
            seconds = once(variants[i % len(variants)], device)
            if i >= warmup:
                samples[name].append(seconds)
    return {name: summarise(times) for name, times in samples.items()}


def captured(calls: Sequence[Call]) -> Call:
    """One CUDA graph that makes all ``calls``: their device time without the host's share."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def copies(bytes_moved: int, sets: int, device: torch.device) -> list[Call]:
    """A plain copy that reads and writes ``bytes_moved`` together, in as many variants as the work it stands beside."""
    buffers = [torch.zeros(2, max(bytes_moved // 2, 1), dtype=torch.uint8, device=device).unbind() for _ in range(sets)]
    return [functools.partial(target.copy_, source) for target, source in buffers]


def per_call(times: Times, calls: int) -> Times:
    return Times(times.q20 / calls, times.median / calls, times.q80 / calls, times.samples)


def copy_bandwidth(device: torch.device, rounds: int = 9) -> float:
    """Bytes a second, read plus written, of the largest plain copy worth making: what "fast" can mean here."""
    source = torch.empty(2**30 if device.type == "cuda" else 2**28, dtype=torch.uint8, device=device).fill_(7)
    target = torch.empty_like(source)
    samples = [once(lambda: target.copy_(source), device) for _ in range(rounds + 2)][2:]
    return 2 * source.numel() / statistics.median(samples)
