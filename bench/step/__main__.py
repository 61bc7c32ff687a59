"""One step of reinforcement learning on Stable Diffusion 3.5, measured: rollout and training, stock against ours.

python -m bench.step                                       # SD3.5 Medium at 512 px on a GPU; the tiny model on a CPU
python -m bench.step --variants stock-fp32,stock,ours,ours+graph --json step.json --out step.md

A step draws a batch of images with the rollout policy (no gradients, no guidance), then at each of some timesteps runs
rollout policy and reference without gradients and the learner with its backward pass to LoRA adapters, then AdamW; the
rollout policy follows. Weights are random, the sizes real. The variants, on the same weights and inputs:

  stock         diffusers and PEFT as they are, eager, bf16 base, the public trainers' loss
  stock-fp32    the same on an fp32 base under autocast to bf16, as public trainers run it
  compile       stock with its transformer blocks compiled by torch.compile
  ours          advflow's loop: fused blocks and low-rank layers of advflow_ext.apply_to_sd3, images drawn on merged
                weights, modulation computed once for the three policies, fused loss
  ours+compile  ours with its blocks compiled
  ...+graph     each of these with its forward and backward passes replayed by advflow_ext.CudaGraphs; on a CPU, which
                has no graphs, the same as without

Every variant is first compared with an fp32 run of stock: velocities and the adapters' gradients may be 1.5 times as
far from it as those of stock in bf16 are. Then all take the step in turn, and each is profiled.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from advflow_ext.bench.harness import memory, report, timing
from advflow_ext.bench.harness.registry import choice_list
from advflow_ext.bench.harness.report import Row
from advflow_ext.kernels import triton_ops
from bench.roofline.cuda_choices import CudaChoices
from bench.roofline.models import SD3_SIZES, Work, add_work_arguments, build_fake, count, fake_inputs, positive, work_of
from bench.step.tables import PHASES, aligned, headline, markdown, tables, warned

if TYPE_CHECKING:
    from bench.step.profile import Share
    from bench.step.variants import Inputs, Outcome, Variant

KINDS = ("stock", "compile", "ours", "ours+compile")
VARIANTS = ("stock-fp32", *KINDS, *(f"{kind}+graph" for kind in KINDS))
DEFAULT_VARIANTS = {"cuda": (*KINDS, "ours+graph"), "cpu": ("stock", "ours")}
ALGORITHMS = ("diffusion_nft", "advantage_flow")
TOLERANCE = 1.5  # of stock's own distance from fp32


@dataclass(frozen=True)
class Flops:
    """Of the matrix products and attentions of one step as stock does them: what every variant is credited with."""

    rollout: int
    training: int

    @property
    def step(self) -> int:
        return self.rollout + self.training


def flops_of(work: Work, steps: int, timesteps: int) -> Flops:
    """Counted on fake tensors. The reference's forward has no adapters."""

    def counted(adapters: bool, gradients: bool) -> int:
        if not adapters:
            transformer.disable_adapters()
        with torch.set_grad_enabled(gradients), FlopCounterMode(display=False) as counter:
            velocity = transformer(**inputs, return_dict=False)[0]
            if gradients:
                velocity.sum().backward()
        return int(counter.get_total_flops())

    # CudaChoices comes last: it must see a call before anything else does.
    with FakeTensorMode(), CudaChoices():
        transformer: Any = build_fake(work.model, torch.bfloat16)
        inputs = fake_inputs(transformer, work)
        learner, rollout, reference = counted(True, True), counted(True, False), counted(False, False)
    return Flops(steps * rollout, timesteps * (rollout + reference + learner))


def mfu(flops: float, seconds: float, peak_tflops: float) -> float:
    """Model FLOPs utilisation: the share of the peak at which `flops` in `seconds` were computed."""
    return flops / seconds / (1e12 * peak_tflops)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """||a - b|| / ||b||."""
    return float((a.double() - b.double()).norm() / b.double().norm())


def check(outcome: Outcome, stock: Outcome, exact: Outcome) -> Row:
    """Distances of one variant from fp32 and from stock, beside stock's own distance from fp32, by what is compared."""
    parts: Row = {}
    for name in ("velocity", "rollout_velocity", "gradients"):
        mine, theirs, truth = (getattr(each, name) for each in (outcome, stock, exact))
        error, rounding = relative(mine, truth), relative(theirs, truth)
        parts[name] = {
            "from_fp32": error,
            "from_stock": relative(mine, theirs),
            "stock_from_fp32": rounding,
            "green": error <= TOLERANCE * rounding,
        }
    return {"green": all(part["green"] for part in parts.values())} | parts


def held_bytes(variant: str) -> int:
    """Of the device. A recorded graph keeps memory that nothing is allocated in, so there what is reserved counts."""
    if not variant.endswith("graph"):
        return torch.cuda.memory_allocated()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()


def prepare(row: Row, variant: Variant, inputs: Inputs, device: torch.device, before: int, base_bytes: int) -> None:
    """Takes a first step, then measures memory: what the variant holds, the base included, and a step's peak beyond."""

    def step() -> None:
        variant.roll_out(inputs)
        variant.train(inputs)

    step()
    if device.type == "cuda":
        held = held_bytes(variant.name) - before
        row["held_bytes"] = held + (base_bytes if variant.shares_base else 0)
    row["peak_extra_bytes"] = memory.peak_extra_bytes(step, device)


def profile_of(variant: Variant, inputs: Inputs, device: torch.device) -> dict[str, Row]:
    """Seconds and launches of a whole step, by phase and site: a step of the sampler and a timestep, multiplied."""
    from bench.step.profile import by_site

    short = replace(inputs, sigmas=inputs.sigmas[-2:])
    draw = inputs.draws[0]
    parts: list[tuple[str, int, Callable[[Callable[[torch.Tensor], None]], object]]] = [
        ("rollout", len(inputs.sigmas) - 1, lambda _: variant.roll_out(short)),
        ("training", len(inputs.draws), lambda backward: variant.accumulate(inputs, draw, inputs.noise, backward)),
        ("training", 1, lambda _: variant.update()),
        ("rollout", 1, lambda _: variant.switch_to_rollout()),
    ]
    found: dict[str, dict[str, Row]] = {phase: {} for phase in PHASES}
    variant.switch_to_rollout()
    for phase, times, part in parts:
        shares: dict[str, Share] = by_site(part, variant.model, device, variant.closed)
        for site, share in shares.items():
            row = found[phase].setdefault(site, {"seconds": 0.0, "launches": 0})
            row["seconds"] += times * share.seconds
            row["launches"] += times * share.launches
    return found


def throughput(row: Row, batch: int, flops: Flops, peak_tflops: float) -> None:
    """Images a second and MFU of both phases and of the whole step, from the medians of their times."""
    seconds = {phase: row["times"][phase]["median"] for phase in PHASES}
    seconds["step"] = sum(seconds.values())
    row["images_per_second"] = {part: batch / each for part, each in seconds.items()}
    row["mfu"] = {part: mfu(getattr(flops, part), each, peak_tflops) for part, each in seconds.items()}


def host_gaps(row: Row) -> dict[str, float]:
    """By phase, the seconds in which no kernel ran: of the unprofiled median, what the profiled kernels leave over."""
    busy = {phase: sum(site["seconds"] for site in row["profile"][phase].values()) for phase in PHASES}
    return {phase: max(0.0, row["times"][phase]["median"] - busy[phase]) for phase in PHASES}


def measure(document: Row, work: Work, device: torch.device, save: Callable[[], None]) -> None:
    """Fills `document["results"]`, one row for each variant, and calls `save` whenever something has been added."""
    from bench.step import variants as made

    algorithm, steps, timesteps = (document["step"][name] for name in ("algorithm", "steps", "timesteps"))
    flops = Flops(document["flops"]["rollout"], document["flops"]["training"])
    inputs = made.make_inputs(work, steps, timesteps, device)
    base = made.make_base(work.model, device)
    base_bytes = sum(tensor.nbytes for tensor in (*base.parameters(), *base.buffers()))
    progress("stock in fp32 and in bf16, to compare with")
    exact = made.exact_outcome(base, algorithm, inputs)
    stock = made.Variant("stock", base, algorithm).outcome(inputs)
    gc.collect()  # their models are cycles, and would otherwise go away in the midst of measuring memory
    variants: dict[str, tuple[Row, Variant]] = {}
    for name in document["variants"]:
        progress(f"{name}: first calls, correctness, memory")
        row: Row = {"variant": name}
        document["results"].append(row)
        before = held_bytes(name) if device.type == "cuda" else 0
        with warnings.catch_warnings(record=True) as said:
            try:
                variant = made.Variant(name, base, algorithm)
                row["check"] = check(variant.outcome(inputs), stock, exact)
                prepare(row, variant, inputs, device, before, base_bytes)
                variants[name] = row, variant
            except Exception as error:  # one that cannot run on this machine must not hide the others
                row |= {"check": row.get("check", {}) | {"green": False}, "error": first_line(error)}
        # Among them: that a fused op was found wrong and the stock one serves.
        row["warnings"] = list(dict.fromkeys(str(warning.message).splitlines()[0] for warning in said))
        save()
    progress(f"timing {len(variants)} variants in turn, {document['rounds']} rounds")
    times = timing.round_robin(_calls(variants, inputs), device, document["rounds"], warmup=0)
    for name, (row, _) in variants.items():
        row["times"] = {phase: times[f"{name} {phase}"].to_json() for phase in PHASES}
        throughput(row, work.batch, flops, document["peak_tflops"])
    save()
    for name, (row, variant) in variants.items():
        progress(f"{name}: profile")
        row["profile"] = profile_of(variant, inputs, device)
        row["launches"] = {phase: sum(site["launches"] for site in row["profile"][phase].values()) for phase in PHASES}
        if device.type == "cuda":
            row["host_gap_seconds"] = host_gaps(row)
        save()


def _calls(variants: dict[str, tuple[Row, Variant]], inputs: Inputs) -> dict[str, list[timing.Call]]:
    """In the order of a step, so that what training changes is merged again in the rollout that follows."""
    calls: dict[str, list[timing.Call]] = {}
    for name, (_, variant) in variants.items():
        calls[f"{name} rollout"] = [lambda variant=variant: variant.roll_out(inputs)]  # type: ignore[misc]
        calls[f"{name} training"] = [lambda variant=variant: variant.train(inputs)]  # type: ignore[misc]
    return calls


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:200]


def notes(device: torch.device) -> list[str]:
    """What a reader must know of the machine before the numbers."""
    found = []
    if not triton_ops.serves(torch.empty(0, device=device)):
        found.append(
            f"Triton does not run on {device.type} here: ours' blocks are the stock ones, and what it differs in are "
            "its low-rank layers, merged weights, shared modulation and loss."
        )
    if device.type == "cpu":
        found.append(
            "On a CPU compiled variants are traced but not compiled to machine code (backend aot_eager), launches are "
            "operators, the profile is of their own time under the profiler, memory is without the weights, and there "
            "are no host gaps: these numbers show that the bench works and say nothing about a GPU."
        )
    return found


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m bench.step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_work_arguments(p, SD3_SIZES, model=None)
    p.add_argument("--steps", type=count, help="sampler steps of the rollout; default 10, tiny 2")
    p.add_argument("--timesteps", type=count, help="training timesteps an image; default 9, tiny 2")
    p.add_argument("--algorithm", choices=ALGORITHMS, default=ALGORITHMS[0], help="whose loss; default diffusion_nft")
    p.add_argument(
        "--variants",
        type=choice_list(VARIANTS),
        metavar="NAMES",
        help=f"comma-separated, of {', '.join(VARIANTS)}; default {','.join(DEFAULT_VARIANTS['cuda'])}, on a CPU "
        "stock,ours: compiling takes minutes",
    )
    p.add_argument("--rounds", type=count, help="timed steps of each variant; default 5, on a CPU 1")
    p.add_argument(
        "--peak-tflops",
        type=positive,
        default=989.0,
        help="what MFU is a share of; default 989, the data sheet's dense bf16 of H100 and H200",
    )
    p.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: cuda where there is one")
    p.add_argument("--json", type=Path, metavar="FILE", help="write everything measured here, as soon as it is")
    p.add_argument("--out", type=Path, metavar="FILE", help="write the tables here as Markdown")
    return p


def missing() -> list[str]:
    """Packages that are needed and not there; advflow is the trainer, in python/."""
    return [name for name in ("diffusers", "peft", "advflow") if importlib.util.find_spec(name) is None]


def main(argv: list[str] | None = None) -> int:
    options = parser().parse_args(argv)
    if absent := missing():
        progress(
            f"bench.step runs the real transformer and needs {' and '.join(absent)}, which cannot be imported here."
        )
        return 1
    if options.device == "cuda" and not torch.cuda.is_available():
        parser().error("--device cuda: no CUDA device is usable here")
    device = torch.device("cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu")
    options.model = options.model or ("sd35-medium" if device.type == "cuda" else "tiny")
    tiny, work = options.model == "tiny", work_of(options, parser())
    step = {
        "steps": options.steps or (2 if tiny else 10),
        "timesteps": options.timesteps or (2 if tiny else 9),
        "algorithm": options.algorithm,
    }
    progress("counting FLOPs")
    flops = flops_of(work, step["steps"], step["timesteps"])
    document: Row = {
        "environment": report.environment(device) | {name: report.installed(name) for name in ("diffusers", "peft")},
        "work": asdict(work),
        "step": step,
        "variants": list(dict.fromkeys(options.variants or DEFAULT_VARIANTS[device.type])),
        "rounds": options.rounds or (5 if device.type == "cuda" else 1),
        "peak_tflops": options.peak_tflops,
        "flops": asdict(flops) | {"step": flops.step},
        "notes": notes(device),
        "results": [],
    }

    def save() -> None:
        if options.json is not None:
            report.write(document, options.json)

    # Past its limit torch.compile would go on uncompiled, and nobody would see it in the numbers.
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        measure(document, work, device, save)
    print("\n".join([headline(document), *document["notes"], *warned(document)]))
    for table in tables(document):
        print(f"\n{aligned(table)}")
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(markdown(document))
    return 0 if all(row["check"]["green"] for row in document["results"]) else 1


if __name__ == "__main__":
    sys.exit(main())
