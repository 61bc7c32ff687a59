"""``python -m advflow_ext.bench``: correctness first, then time, bytes and memory of each implementation of each op."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from advflow_ext.bench.harness import chart, report, timing
from advflow_ext.bench.harness.progress import Progress
from advflow_ext.bench.harness.registry import COPY, OURS, cases, choice_list, parse_shapes
from advflow_ext.bench.measure import measure, wanted, work_of
from advflow_ext.bench.ops.block import LIBRARIES, is_installed, shape_obstacle
from advflow_ext.bench.ops.blocks import BLOCKS
from advflow_ext.bench.ops.plans import COMPILED, LATENT_OPS, OPS, Planned, chosen, cpu_plan, gpu_plan, user_plan

WANTED_ENVIRONMENT = {
    # Waiting threads that spin lose a time slice in each parallel region as soon as anything else wants the core (seen:
    # 3 ms of eager PyTorch became 150 ms), which would flatter whoever has fewest regions.
    "OMP_WAIT_POLICY": "passive",
    "KINETO_LOG_LEVEL": "6",  # or the profiler, asked for memory, says on stderr when it starts and stops
}


def shape_list(text: str) -> list[tuple[int, ...]]:
    try:
        return parse_shapes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None  # argparse would hide a ValueError's text


def page(text: str) -> Path | None:
    if text == "none":
        return None
    if not text.endswith(".html"):
        raise argparse.ArgumentTypeError(f"{text!r}: accepted is a name that ends in .html, or none")
    return Path(text)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m advflow_ext.bench",
        description="Times every op on this machine beside the public trainers' own formulas and torch.compile, after "
        "comparing each with float64. Without options: each op once, in minutes.",
    )
    p.add_argument("--ops", type=choice_list(list(OPS)), help=f"comma-separated, of {', '.join(OPS)}")
    p.add_argument("--shapes", type=shape_list, help="as 8x16x64x64,8x1024x64; default each op's own")
    p.add_argument("--dtypes", type=choice_list(["fp32", "fp16", "bf16"]), help="default fp32,bf16 of ops named")
    p.add_argument(
        "--ref", choices=["both", "with", "without"], help="with or without v_ref; default both of ops named"
    )
    p.add_argument("--only", type=lambda text: text.split(","), help="implementations, as ours,public")
    p.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    p.add_argument("--threads", type=int, help="CPU threads; default torch's choice")
    p.add_argument("--rounds", type=int, help="timed rounds; default 50")
    p.add_argument("--quick", action="store_true", help="nothing compiled, one case of an op, 15 rounds: a minute")
    p.add_argument("--sweep", action="store_true", help="many sizes and dtypes, in order of worth: use --limit")
    p.add_argument("--limit", type=float, metavar="SECONDS", help="begin no further case after this time")
    p.add_argument("--plot", type=page, default="advflow-bench.html", metavar="OUT.html", help="bars, in one page that "
                   "needs nothing beside itself; default %(default)s, none for none")  # fmt: skip
    p.add_argument("--json", type=Path, metavar="OUT", help="write everything measured here, after every case")
    return p


def plan(options: argparse.Namespace, device: torch.device) -> list[Planned]:
    """What was asked for, or every op once where nothing was."""
    if options.sweep:
        return list(gpu_plan() if device.type == "cuda" else cpu_plan())
    if not (options.ops or options.dtypes or options.ref):
        planned = list(user_plan(device, options.shapes))
    else:
        dtypes = options.dtypes or ["fp32", "bf16"]
        refs = {"both": (False, True), "with": (True,), "without": (False,)}[options.ref or "both"]
        if options.quick:
            dtypes, refs = dtypes[:1], refs[:1]
        found = cases(chosen(tuple(options.ops or LATENT_OPS)), options.shapes, dtypes, refs)
        one_shape = options.quick and not options.shapes
        planned = [Planned(case) for case in found if not one_shape or case.shape == OPS[case.op].shapes[0]]
    without = COMPILED.difference(options.only or ()) if options.quick else frozenset()
    return [Planned(each.case, each.without | without) for each in planned]


def notes(planned: list[Planned], environment: dict[str, Any]) -> Iterator[str]:
    """What a reader of the rows must know."""
    ops = {each.case.op for each in planned}
    blocks = ops & BLOCKS.keys()
    if ops - blocks and not environment["native"]:
        yield "advflow_ext has no compiled code for this device: 'ours' is the reference here"
    if blocks and not environment["triton_kernels"]:
        yield "Triton's kernels do not run here: 'ours' is the reference in the ops of a block, lora_linear aside"
    for row, module in LIBRARIES.items():
        if blocks and not is_installed(row):
            yield f"{module} is not installed: its rows are left out"


def headline(environment: dict[str, Any], bandwidth: float) -> str:
    cpu = f"{environment['cpu']}, {environment['threads']} threads"
    where = environment["gpu"]["name"] if environment["gpu"] else cpu
    return f"{where}; torch {environment['torch']}; commit {environment['commit']}; copy {bandwidth / 1e9:.1f} GB/s"


def write(document: dict[str, Any], options: argparse.Namespace) -> None:
    if options.json is not None:
        report.write(document, options.json)
    if options.plot is not None:
        options.plot.parent.mkdir(parents=True, exist_ok=True)
        options.plot.write_text(chart.html(document))


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

    progress = Progress(sum(work_of(name) for each in planned for name in wanted(each, device, options.only)))
    environment = report.environment(device)
    progress.doing("measuring copy bandwidth")
    bandwidth = timing.copy_bandwidth(device)
    progress.clear()
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
        # Compiled code of earlier cases would otherwise count against the limit on recompilations.
        torch.compiler.reset()
        result = measure(each, device, rounds, options.only, progress)
        document["results"].append(result)
        document["left_out"].remove(each.case.name)
        write(document, options)
        progress.clear()
        print(f"\n{report.table(result, bandwidth)}", flush=True)
    if document["left_out"]:
        print(f"\nleft out after {options.limit:g} s: {', '.join(document['left_out'])}")
    write(document, options)
    for path in filter(None, (options.json, options.plot)):
        print(f"wrote {path}", file=sys.stderr)
    ours = [row for result in document["results"] for row in result["implementations"] if row["implementation"] == OURS]
    return 0 if all(row["check"]["green"] for row in ours) else 1


if __name__ == "__main__":
    if not WANTED_ENVIRONMENT.keys() <= os.environ.keys():
        # Importing the package has loaded torch, which has read the environment: so once more, from the start.
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], WANTED_ENVIRONMENT | os.environ)
    sys.exit(main())
