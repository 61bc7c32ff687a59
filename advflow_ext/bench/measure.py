"""One case: every implementation checked, then timed in turn with the others."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from advflow_ext.bench.harness import memory, report, timing
from advflow_ext.bench.harness.progress import Progress
from advflow_ext.bench.harness.registry import COPY, Implementation, latent_bytes
from advflow_ext.bench.ops.plans import COMPILED, OPS, Planned

COMPILING = 10.0  # how many times the work of another implementation, roughly


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:200]


def wanted(planned: Planned, device: torch.device, only: Sequence[str] | None) -> dict[str, Implementation]:
    implementations = OPS[planned.case.op].implementations(device)
    return {
        name: implementation
        for name, implementation in implementations.items()
        if name not in planned.without and (only is None or name in only)
    }


def work_of(name: str) -> float:
    return COMPILING if name in COMPILED else 1.0


def measure(
    planned: Planned, device: torch.device, rounds: int, only: Sequence[str] | None, progress: Progress
) -> dict[str, Any]:
    case, op = planned.case, OPS[planned.case.op]
    implementations = wanted(planned, device, only)
    progress.doing(case.name, "inputs")
    bytes_moved = op.bytes_moved(case)
    first = op.arguments(case, device, 0)
    sets = timing.input_sets(first.bytes, timing.cache_bytes(device))
    arguments = [first, *(op.arguments(case, device, seed) for seed in range(1, sets))]
    truth = op.truth(first)

    rows: list[report.Row] = []
    calls: dict[str, list[timing.Call]] = {}
    for name, implementation in implementations.items():
        progress.doing(case.name, f"{name}: first call")
        variants: list[timing.Call] = [functools.partial(implementation.run, each) for each in arguments]
        try:
            check = op.check(case, first, truth, implementation.run(first), implementation.standard)
            row: report.Row = {"implementation": name, "check": asdict(check) | {"green": check.green}}
            row["peak_extra_bytes"] = memory.peak_extra_bytes(variants[0], device)
            calls[name] = variants
        except Exception as error:  # A baseline that cannot run on this machine must not hide the others.
            row = {"implementation": name, "check": {"green": False}, "error": first_line(error)}
        rows.append(row)
        progress.finished(work_of(name))
    del truth
    if only is None or COPY in only:
        rows.append({"implementation": COPY, "check": {"green": True}, "peak_extra_bytes": 0})
        calls[COPY] = timing.copies(bytes_moved, sets, device)

    progress.doing(case.name, f"timing {len(calls)} in turn")
    times = timing.round_robin(calls, device, rounds)
    graph_times = {}
    if device.type == "cuda":
        capturable = {name: each for name, each in calls.items() if name == COPY or implementations[name].capturable}
        graph_times = graph_replays(capturable, device, rounds, progress)
    for row in rows:
        name = row["implementation"]
        row["times"] = times[name].to_json() if name in times else None
        row["graph_times"] = graph_times[name].to_json() if name in graph_times else None
    return {
        "case": asdict(case) | {"name": case.name},
        "source": op.source,
        "bytes_moved": bytes_moved,
        "gradient_bytes": latent_bytes(case),
        "input_sets": sets,
        "implementations": rows,
        "ours_is_faster_than": {row["implementation"]: report.speedup(rows, row["implementation"]) for row in rows},
    }


def graph_replays(
    calls: dict[str, list[timing.Call]], device: torch.device, rounds: int, progress: Progress
) -> dict[str, timing.Times]:
    """Time a call inside a CUDA graph over all input sets; an implementation that cannot be captured is left out."""
    replays = {}
    for name, variants in calls.items():
        try:
            replays[name] = [timing.captured(variants)]
        except Exception as error:
            progress.doing(f"{name}: no CUDA graph ({first_line(error)})")
    times = timing.round_robin(replays, device, rounds)
    return {name: timing.per_call(each, len(calls[name])) for name, each in times.items()}
