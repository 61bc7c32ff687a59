"""``python -m bench``: correctness first, then time, bytes and memory of every implementation of every op."""

from __future__ import annotations

import argparse
import functools
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench import memory, report, timing
from bench.registry import DTYPES, OPS, Arguments, Case, cases, parse_shapes


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:200]


def measure(case: Case, device: torch.device, rounds: int, only: list[str] | None) -> dict[str, Any]:
    op = OPS[case.op]
    bytes_moved = op.bytes_moved(case)
    gradient_bytes = torch.Size(case.shape).numel() * DTYPES[case.dtype].itemsize
    sets = timing.input_sets(bytes_moved // 2, timing.cache_bytes(device))
    arguments: list[Arguments] = [op.arguments(case, device, seed) for seed in range(sets)]

    rows: list[report.Row] = []
    calls: dict[str, list[timing.Call]] = {}
    for name, implementation in op.implementations().items():
        if only is not None and name not in only:
            continue
        progress(f"  {name}: first call, correctness, memory")
        variants: list[timing.Call] = [functools.partial(implementation, each) for each in arguments]
        try:
            check = op.check(case, arguments[0], implementation(arguments[0]))
            row: report.Row = {"implementation": name, "check": asdict(check) | {"green": check.green}}
            row["peak_extra_bytes"] = memory.peak_extra_bytes(variants[0], device)
            calls[name] = variants
        except Exception as error:  # A baseline that cannot run on this machine must not hide the others.
            row = {"implementation": name, "check": {"green": False}, "error": first_line(error)}
        rows.append(row)

    progress(f"  timing {len(calls)} implementations in turn, {rounds} rounds over {sets} input sets")
    times = timing.round_robin(calls, device, rounds)
    graph_times = graph_replays(calls, device, rounds) if device.type == "cuda" else {}
    for row in rows:
        name = row["implementation"]
        row["times"] = times[name].to_json() if name in times else None
        row["graph_times"] = graph_times[name].to_json() if name in graph_times else None
    return {
        "case": asdict(case) | {"name": case.name},
        "bytes_moved": bytes_moved,
        "gradient_bytes": gradient_bytes,
        "input_sets": sets,
        "implementations": rows,
        "ours_is_faster_than": {row["implementation"]: report.speedup(rows, row["implementation"]) for row in rows},
    }


def graph_replays(calls: dict[str, list[timing.Call]], device: torch.device, rounds: int) -> dict[str, timing.Times]:
    """Time a call inside a CUDA graph over all input sets; an implementation that cannot be captured is left out."""
    replays = {}
    for name, variants in calls.items():
        try:
            replays[name] = [timing.captured(variants)]
        except Exception as error:
            progress(f"  {name}: no CUDA graph ({first_line(error)})")
    times = timing.round_robin(replays, device, rounds)
    return {name: timing.per_call(each, len(calls[name])) for name, each in times.items()}


def choice_list(allowed: list[str]) -> Any:
    def parse(text: str) -> list[str]:
        items = [item.strip() for item in text.split(",")]
        for item in items:
            if item not in allowed:
                raise argparse.ArgumentTypeError(f"{item!r}: choose from {', '.join(allowed)}")
        return items

    return parse


def shape_list(text: str) -> list[tuple[int, ...]]:
    try:
        return parse_shapes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None  # argparse would hide a ValueError's text


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    p.add_argument("--ops", type=choice_list(list(OPS)), default=list(OPS), help="comma-separated; default all")
    p.add_argument("--shapes", type=shape_list, help="as 8x16x64x64,8x1024x64; default each op's own")
    p.add_argument("--dtypes", type=choice_list(list(DTYPES)), default=["fp32", "bf16"], help="fp32,fp16,bf16")
    p.add_argument("--ref", choices=["both", "with", "without"], default="both", help="with or without v_ref")
    p.add_argument("--only", type=lambda text: text.split(","), help="implementations, as ours,eager")
    p.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    p.add_argument("--threads", type=int, help="CPU threads; default torch's choice")
    p.add_argument("--rounds", type=int, help="timed rounds; default 50")
    p.add_argument("--quick", action="store_true", help="one shape, fp32, 15 rounds: does it work at all?")
    p.add_argument("--json", type=Path, metavar="OUT", help="write everything measured here")
    return p


def main(argv: list[str] | None = None) -> int:
    options = parser().parse_args(argv)
    known = {name for op in options.ops for name in OPS[op].implementations()}
    if options.only is not None and not known.issuperset(options.only):
        parser().error(f"--only {','.join(options.only)}: choose from {', '.join(sorted(known))}")
    use_cuda = options.device == "cuda" or (options.device == "auto" and torch.cuda.is_available())
    device = torch.device("cuda" if use_cuda else "cpu")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    rounds = options.rounds or (15 if options.quick else 50)
    refs = {"both": [False, True], "with": [True], "without": [False]}[options.ref]
    shapes, dtypes = options.shapes, options.dtypes
    if options.quick:
        shapes, dtypes, refs = shapes or [(8, 16, 64, 64)], dtypes[:1], refs[:1]

    environment = report.environment(device)
    progress("measuring copy bandwidth")
    bandwidth = timing.copy_bandwidth(device)
    where = (
        environment["gpu"]["name"] if environment["gpu"] else f"{environment['cpu']}, {environment['threads']} threads"
    )
    print(f"{where}; torch {environment['torch']}; commit {environment['commit']}; copy {bandwidth / 1e9:.1f} GB/s")
    if not environment["native"]:
        print("advflow_ext has no compiled code for this device: 'ours' is the reference here")

    results = []
    for case in cases(options.ops, shapes, dtypes, refs):
        progress(case.name)
        # Compiled code of earlier cases would otherwise count against the limit on recompilations.
        torch.compiler.reset()
        result = measure(case, device, rounds, options.only)
        results.append(result)
        print()
        print(
            report.table(
                case.name, result["implementations"], result["bytes_moved"], result["gradient_bytes"], bandwidth
            ),
            flush=True,
        )
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        document = {
            "environment": environment,
            "copy_bytes_per_second": bandwidth,
            "rounds": rounds,
            "results": results,
        }
        options.json.write_text(json.dumps(document, indent=1) + "\n")
        progress(f"wrote {options.json}")
    ours = [row for result in results for row in result["implementations"] if row["implementation"] == "ours"]
    return 0 if all(row["check"]["green"] for row in ours) else 1


if __name__ == "__main__":
    sys.exit(main())
