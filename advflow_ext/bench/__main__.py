"""``python -m advflow_ext.bench``: correctness first, then time, bytes and memory of each implementation of each op."""

from __future__ import annotations

import argparse
import functools
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from advflow_ext.bench.harness import memory, report, timing
from advflow_ext.bench.harness.registry import COPY, OURS, cases, choice_list, latent_bytes, parse_shapes
from advflow_ext.bench.ops.block import has_liger, shape_obstacle
from advflow_ext.bench.ops.blocks import BLOCKS
from advflow_ext.bench.ops.plans import OPS, Planned, chosen, cpu_plan, gpu_plan

WANTED_ENVIRONMENT = {
    # Waiting threads that spin lose a time slice in each parallel region as soon as anything else wants the core (seen:
    # 3 ms of eager PyTorch became 150 ms), which would flatter whoever has fewest regions.
    "OMP_WAIT_POLICY": "passive",
    "KINETO_LOG_LEVEL": "6",  # or the profiler, asked for memory, says on stderr when it starts and stops
}


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:200]


def measure(planned: Planned, device: torch.device, rounds: int, only: list[str] | None) -> dict[str, Any]:
    case, op = planned.case, OPS[planned.case.op]
    bytes_moved = op.bytes_moved(case)
    first = op.arguments(case, device, 0)
    sets = timing.input_sets(first.bytes, timing.cache_bytes(device))
    arguments = [first, *(op.arguments(case, device, seed) for seed in range(1, sets))]
    truth = op.truth(first)

    rows: list[report.Row] = []
    calls: dict[str, list[timing.Call]] = {}
    implementations = op.implementations(device)
    wanted = [name for name in implementations if name not in planned.without and (only is None or name in only)]
    for name in wanted:
        implementation = implementations[name]
        progress(f"  {name}: first call, correctness, memory")
        variants: list[timing.Call] = [functools.partial(implementation.run, each) for each in arguments]
        try:
            check = op.check(case, first, truth, implementation.run(first), implementation.standard)
            row: report.Row = {"implementation": name, "check": asdict(check) | {"green": check.green}}
            row["peak_extra_bytes"] = memory.peak_extra_bytes(variants[0], device)
            calls[name] = variants
        except Exception as error:  # A baseline that cannot run on this machine must not hide the others.
            row = {"implementation": name, "check": {"green": False}, "error": first_line(error)}
        rows.append(row)
    del truth
    if only is None or COPY in only:
        rows.append({"implementation": COPY, "check": {"green": True}, "peak_extra_bytes": 0})
        calls[COPY] = timing.copies(bytes_moved, sets, device)

    progress(f"  timing {len(calls)} implementations in turn, {rounds} rounds over {sets} input sets")
    times = timing.round_robin(calls, device, rounds)
    graph_times = {}
    if device.type == "cuda":
        capturable = {name: each for name, each in calls.items() if name == COPY or implementations[name].capturable}
        graph_times = graph_replays(capturable, device, rounds)
    for row in rows:
        name = row["implementation"]
        row["times"] = times[name].to_json() if name in times else None
        row["graph_times"] = graph_times[name].to_json() if name in graph_times else None
    return {
        "case": asdict(case) | {"name": case.name},
        "bytes_moved": bytes_moved,
        "gradient_bytes": latent_bytes(case),
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


def shape_list(text: str) -> list[tuple[int, ...]]:
    try:
        return parse_shapes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None  # argparse would hide a ValueError's text


def parser() -> argparse.ArgumentParser:
    everything = list(OPS)
    p = argparse.ArgumentParser(prog="python -m advflow_ext.bench", description=__doc__)
    p.add_argument("--ops", type=choice_list(everything), help=f"comma-separated, of {', '.join(everything)}")
    p.add_argument(
        "--shapes",
        type=shape_list,
        help="as 8x16x64x64,8x1024x64; default each op's own",
    )
    p.add_argument("--dtypes", type=choice_list(["fp32", "fp16", "bf16"]), help="default fp32,bf16")
    p.add_argument("--ref", choices=["both", "with", "without"], help="with or without v_ref; default both")
    p.add_argument("--only", type=lambda text: text.split(","), help="implementations, as ours,eager")
    p.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    p.add_argument("--threads", type=int, help="CPU threads; default torch's choice")
    p.add_argument("--rounds", type=int, help="timed rounds; default 50")
    p.add_argument("--quick", action="store_true", help="one shape of an op, fp32, 15 rounds: does it work at all?")
    p.add_argument("--limit", type=float, metavar="SECONDS", help="begin no further case after this time")
    p.add_argument("--json", type=Path, metavar="OUT", help="write everything measured here, after every case")
    return p


def plan(options: argparse.Namespace, device: torch.device) -> list[Planned]:
    """What was asked for, or the device's own plan where nothing was."""
    if not (options.ops or options.shapes or options.dtypes or options.ref or options.quick):
        return list(gpu_plan() if device.type == "cuda" else cpu_plan())
    ops = chosen(tuple(options.ops or ["advantage_flow_loss"]))
    dtypes = options.dtypes or ["fp32", "bf16"]
    refs = {"both": (False, True), "with": (True,), "without": (False,)}[options.ref or "both"]
    if options.quick:
        dtypes, refs = dtypes[:1], refs[:1]
    found = list(cases(ops, options.shapes, dtypes, refs))
    if options.quick and not options.shapes:
        found = [case for case in found if case.shape == ops[case.op].shapes[0]]
    return [Planned(case) for case in found]


def notes(planned: list[Planned], environment: dict[str, Any]) -> Iterator[str]:
    """What a reader of the rows must know."""
    ops = {each.case.op for each in planned}
    blocks = ops & BLOCKS.keys()
    if ops - blocks and not environment["native"]:
        yield "advflow_ext has no compiled code for this device: 'ours' is the reference here"
    if blocks and not environment["triton_kernels"]:
        yield "Triton's kernels do not run here: 'ours' is the reference in the ops of a block, lora_linear aside"
    if blocks and not has_liger():
        yield "liger_kernel is not installed: its rows are left out"


def headline(environment: dict[str, Any], bandwidth: float) -> str:
    cpu = f"{environment['cpu']}, {environment['threads']} threads"
    where = environment["gpu"]["name"] if environment["gpu"] else cpu
    return f"{where}; torch {environment['torch']}; commit {environment['commit']}; copy {bandwidth / 1e9:.1f} GB/s"


def main(argv: list[str] | None = None) -> int:
    began = time.monotonic()
    options = parser().parse_args(argv)
    use_cuda = options.device == "cuda" or (options.device == "auto" and torch.cuda.is_available())
    device = torch.device("cuda" if use_cuda else "cpu")
    planned = plan(options, device)
    for case in (each.case for each in planned):
        obstacle = shape_obstacle(case.shape) if case.op in BLOCKS else None
        if obstacle is not None:
            parser().error(f"--shapes, --ops {case.op}: {obstacle}")
    known = {COPY} | {name for each in planned for name in OPS[each.case.op].implementations(device)}
    if options.only is not None and not known.issuperset(options.only):
        parser().error(f"--only {','.join(options.only)}: choose from {', '.join(sorted(known))}")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    rounds = options.rounds or (15 if options.quick else 50)

    environment = report.environment(device)
    progress("measuring copy bandwidth")
    bandwidth = timing.copy_bandwidth(device)
    print(headline(environment, bandwidth))
    for note in notes(planned, environment):
        print(note)

    document: dict[str, Any] = {
        "environment": environment,
        "copy_bytes_per_second": bandwidth,
        "rounds": rounds,
        "left_out": [each.case.name for each in planned],
        "results": [],
    }
    for each in planned:
        if options.limit is not None and time.monotonic() - began > options.limit:
            break
        progress(each.case.name)
        # Compiled code of earlier cases would otherwise count against the limit on recompilations.
        torch.compiler.reset()
        result = measure(each, device, rounds, options.only)
        document["results"].append(result)
        document["left_out"].remove(each.case.name)
        if options.json is not None:
            report.write(document, options.json)
        print(f"\n{report.table(result, bandwidth)}", flush=True)
    if document["left_out"]:
        print(f"\nleft out after {options.limit:g} s: {', '.join(document['left_out'])}")
    if options.json is not None:
        report.write(document, options.json)
        progress(f"wrote {options.json}")
    ours = [row for result in document["results"] for row in result["implementations"] if row["implementation"] == OURS]
    return 0 if all(row["check"]["green"] for row in ours) else 1


if __name__ == "__main__":
    if not WANTED_ENVIRONMENT.keys() <= os.environ.keys():
        # Importing the package has loaded torch, which has read the environment: so once more, from the start.
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], WANTED_ENVIRONMENT | os.environ)
    sys.exit(main())
