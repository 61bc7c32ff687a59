"""The account of bytes: what one training step of a transformer moves, launches, computes and keeps, by site.

python -m bench.roofline --model sd35-medium --batch 9 --px 512 --json bench/results/roofline.json
python -m bench.roofline --model flux1-dev --adapters bf16
python -m bench.roofline --render bench/results/roofline.json --out docs/images/roofline.png

Builds diffusers' transformer with PEFT adapters on fake tensors (shapes without data: no GPU, no weights, little
memory), runs a training step (forward, and backward to the adapters alone) and a forward pass without gradients, and
counts every operator. Three variants side by side:

  stock     diffusers and PEFT as they are
  rms_norm  diffusers' RMSNorm, eight operators, replaced by torch.nn.functional.rms_norm, which FLUX.1 has anyway
  ours      advflow_ext.apply_to_sd3 or a sibling, mode="train" in the step and mode="infer" in the forward without
            gradients

Each operator reads every tensor argument once and writes every result once; views are free. Time is the roofline's: an
operator takes the longer of its FLOPs at the rate given and its bytes at the bandwidth given, launches take none. All
numbers are predictions from shapes. No GPU has confirmed them.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from advflow_ext.bench.harness import report
from advflow_ext.bench.harness.registry import choice_list
from bench.roofline.account import OTHER, Account, Event, Kind, trace
from bench.roofline.cuda_choices import CudaChoices
from bench.roofline.models import FLUX, SIZES, Work, add_work_arguments, build_fake, fake_inputs, positive, work_of
from bench.roofline.sites import ATTENTION, GEMM, LORA_GEMM, SITES, site_of

TRAIN_FORWARD, TRAIN_BACKWARD, NO_GRAD = "train forward", "train backward", "no-grad forward"
PASSES = (TRAIN_FORWARD, TRAIN_BACKWARD, NO_GRAD)
ADAPTER_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Rates:
    """Of the machine predicted for."""

    tflops: float
    sdpa_tflops: float
    gbps: float

    def seconds(self, event: Event) -> float:
        flops_per_second: dict[Kind, float] = {"attention": 1e12 * self.sdpa_tflops}
        compute = event.flops / flops_per_second.get(event.kind, 1e12 * self.tflops)
        return max(compute, (event.read + event.written) / (1e9 * self.gbps))


@contextmanager
def _stock(_transformer: nn.Module, _mode: str) -> Iterator[None]:
    yield


@contextmanager
def _functional_rms_norm(transformer: nn.Module, _mode: str) -> Iterator[None]:
    from diffusers.models.normalization import RMSNorm

    norms = [module for module in transformer.modules() if isinstance(module, RMSNorm)]
    for norm in norms:
        norm.forward = lambda x, norm=norm: torch.nn.functional.rms_norm(x, tuple(norm.dim), norm.weight, norm.eps)
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward


@contextmanager
def _ours(transformer: nn.Module, mode: Literal["train", "infer"]) -> Iterator[None]:
    families = {size.family.transformer: size.family for size in SIZES.values()}
    patch = families[type(transformer).__name__].patch
    # Fake tensors sit on the CPU, where kernels serve under Triton's interpreter alone, and have no values to verify.
    with mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1"}):
        with patch(transformer, mode=mode, verify=False):
            yield


_PATCHES = {"stock": _stock, "rms_norm": _functional_rms_norm, "ours": _ours}


def variants(work: Work) -> list[str]:
    """FLUX.1 has no RMSNorm of diffusers to replace."""
    return [name for name in _PATCHES if name != "rms_norm" or SIZES[work.model].family is not FLUX]


def measure(variant: str, adapters: str, work: Work, rates: Rates) -> dict[str, Any]:
    """Traces a training step and a forward without gradients of one variant."""
    # CudaChoices comes last: it must see a call before anything else does.
    with FakeTensorMode(), warnings.catch_warnings(), CudaChoices():
        transformer = build_fake(work.model, ADAPTER_DTYPES[adapters])
        inputs = fake_inputs(transformer, work)

        def velocity_sum() -> Tensor:
            velocity: Tensor = transformer(**inputs, return_dict=False)[0]
            return velocity.sum()

        with _PATCHES[variant](transformer, "train"):
            train = trace(velocity_sum, transformer, site_of, backward=True)
        with _PATCHES[variant](transformer, "infer"), torch.no_grad():
            velocity_sum()  # what is cached at the first call is not paid for by the others
            no_grad = trace(velocity_sum, transformer, site_of, backward=False)
    parameters = list(transformer.parameters())
    return {
        "variant": variant,
        "adapters": adapters,
        "parameters": sum(p.numel() for p in parameters),
        "trainable": sum(p.numel() for p in parameters if p.requires_grad),
        "rows": _rows(train, no_grad, rates),
        "saved": train.saved,
    }


def _rows(train: Account, no_grad: Account, rates: Rates) -> list[dict[str, Any]]:
    """One row for each operator of each site in each pass."""
    rows: dict[tuple[str, ...], dict[str, float]] = defaultdict(lambda: defaultdict(int))
    named = [(f"train {event.phase}", event) for event in train.events]
    for pass_name, event in named + [(NO_GRAD, event) for event in no_grad.events]:
        row = rows[pass_name, event.site, event.op, event.kind]
        row["launches"] += event.launches
        row["read"] += event.read
        row["written"] += event.written
        row["flops"] += event.flops
        row["seconds"] += rates.seconds(event)
    return [
        dict(zip(("pass", "site", "op", "kind"), key, strict=True)) | dict(numbers) for key, numbers in rows.items()
    ]


@dataclass
class Total:
    launches: int = 0
    bytes: int = 0
    flops: int = 0
    seconds: float = 0.0


def total(result: dict[str, Any], passes: tuple[str, ...], site: str | None = None, kind: Kind | None = None) -> Total:
    """Over the operators of some passes, of one site or all, of one kind or all."""
    sums = Total()
    for row in result["rows"]:
        if row["pass"] in passes and site in (None, row["site"]) and kind in (None, row["kind"]):
            sums.launches += row["launches"]
            sums.bytes += row["read"] + row["written"]
            sums.flops += row["flops"]
            sums.seconds += row["seconds"]
    return sums


@dataclass(frozen=True)
class Units:
    """What the numbers of a table are divided by, and what they are then called."""

    bytes: tuple[float, str]
    flops: tuple[float, str]
    seconds: tuple[float, str]
    kept: tuple[float, str]

    def header(self) -> str:
        return f"{'launches':>11}{self.bytes[1]:>8}{self.flops[1]:>8}{self.seconds[1]:>8}"

    def cells(self, sums: Total) -> str:
        if not sums.launches:
            return ""
        moved, computed = sums.bytes / self.bytes[0], sums.flops / self.flops[0]
        return f"{sums.launches:>11}{moved:>8.2f}{computed:>8.2f}{sums.seconds / self.seconds[0]:>8.2f}"


_FIRST_COLUMN, _COLUMN = 28, 35
_LARGE = Units((1e9, "GB"), (1e12, "TFLOP"), (1e-3, "ms"), (2**30, "GiB"))
_SMALL = Units((1e6, "MB"), (1e9, "GFLOP"), (1e-6, "us"), (2**20, "MiB"))


def table(results: list[dict[str, Any]]) -> str:
    """Of the variants with the same adapters: every pass by site, the saved activations, and what changed."""
    stock = next(result for result in results if result["variant"] == "stock")
    units = _LARGE if total(stock, PASSES).bytes > 1e9 else _SMALL
    lines = []
    for pass_name in PASSES:
        lines += _pass_lines(pass_name, results, units) + [""]
    lines += _saved_lines(results, units) + [""]
    return "\n".join(lines + [_against(stock, result) for result in results if result is not stock])


def _line(name: str, cells: Iterable[str]) -> str:
    return f"{name:{_FIRST_COLUMN}}" + "".join(f"{cell:>{_COLUMN}}" for cell in cells)


def _pass_lines(pass_name: str, results: list[dict[str, Any]], units: Units) -> list[str]:
    lines = [_line(pass_name, (result["variant"] for result in results)), _line("", [units.header()] * len(results))]
    for site in SITES:
        sums = [total(result, (pass_name,), site) for result in results]
        if any(each.launches for each in sums):
            lines.append(_line(site, map(units.cells, sums)))
    lines.append(_line("all", (units.cells(total(result, (pass_name,))) for result in results)))
    elementwise = (units.cells(total(result, (pass_name,), kind="elementwise")) for result in results)
    return [*lines, _line("of these elementwise", elementwise)]


def _saved_lines(results: list[dict[str, Any]], units: Units) -> list[str]:
    unit, name = units.kept
    lines = [_line(f"saved activations, {name}", (result["variant"] for result in results))]
    for site in SITES:
        sizes = [result["saved"].get(site, 0) for result in results]
        if any(sizes):
            lines.append(_line(site, (f"{size / unit:.3f}" for size in sizes)))
    return [*lines, _line("all", (f"{sum(result['saved'].values()) / unit:.3f}" for result in results))]


def _against(stock: dict[str, Any], other: dict[str, Any]) -> str:
    step = (TRAIN_FORWARD, TRAIN_BACKWARD)

    def change(measured: Callable[[dict[str, Any]], float]) -> str:
        return f"{100 * (measured(other) / measured(stock) - 1):+.1f} %"

    return (
        f"{other['variant']} against stock, training step: launches {change(lambda r: total(r, step).launches)},"
        f" elementwise bytes {change(lambda r: total(r, step, kind='elementwise').bytes)},"
        f" saved activations {change(lambda r: sum(r['saved'].values()))},"
        f" time {change(lambda r: total(r, step).seconds)};"
        f" forward without gradients: time {change(lambda r: total(r, (NO_GRAD,)).seconds)}"
    )


def draw(document: dict[str, Any], path: Path) -> None:
    """Stacked bars by site: bytes of each pass and saved activations, a row of panels for each dtype of adapters."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    work, rates = document["work"], document["rates"]
    dtypes = list(dict.fromkeys(result["adapters"] for result in document["results"]))
    figure, panels = plt.subplots(
        len(dtypes),
        2,
        figsize=(13, 1.2 + 3.6 * len(dtypes)),
        width_ratios=(3, 1.1),
        squeeze=False,
        layout="constrained",
    )
    for (moved, kept), dtype in zip(panels, dtypes, strict=True):
        results = {result["variant"]: result for result in document["results"] if result["adapters"] == dtype}
        bars = {f"{name}, {variant}": (result, name) for name in PASSES for variant, result in results.items()}
        gigabytes = {
            site: [total(result, (name,), site).bytes / 1e9 for result, name in bars.values()] for site in SITES
        }
        gibibytes = {site: [result["saved"].get(site, 0) / 2**30 for result in results.values()] for site in SITES}
        _stack(moved, list(bars), gigabytes)
        _stack(kept, list(results), gibibytes)
        moved.set(xlabel="GB read and written", title=f"Bytes moved, {dtype} adapters")
        kept.set(xlabel="GiB", title="Saved for the backward pass")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(
        f"Predicted from shapes, not measured: {work['model']}, batch {work['batch']}, {work['px']} px, "
        f"{work['text_tokens']} text tokens ({rates['gbps']:.0f} GB/s: 1 ms is {rates['gbps'] / 1e3:.1f} GB)",
        fontsize="medium",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _stack(axes: Any, labels: list[str], widths: dict[str, list[float]]) -> None:
    import matplotlib.pyplot as plt

    colors: dict[str, Any] = {site: plt.get_cmap("tab10")(number) for number, site in enumerate(SITES)}
    # What no elementwise kernel can save is grey.
    colors |= {ATTENTION: "0.55", GEMM: "0.75", LORA_GEMM: "0.35", OTHER: "0.1"}
    left = [0.0] * len(labels)
    for site, lengths in widths.items():
        axes.barh(range(len(labels)), lengths, left=left, color=colors[site], label=site, height=0.75)
        left = [start + length for start, length in zip(left, lengths, strict=True)]
    for position, end in enumerate(left):
        axes.text(end, position, f" {end:.1f}", va="center", fontsize="small")
    axes.set_yticks(range(len(labels)), labels)
    axes.set_xlim(right=1.18 * max(left))
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m bench.roofline", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_work_arguments(p, list(SIZES))
    p.add_argument(
        "--adapters",
        type=choice_list(ADAPTER_DTYPES),
        default=list(ADAPTER_DTYPES),
        metavar="DTYPES",
        help="of the LoRA weights on the bf16 base, comma-separated; default bf16,fp32",
    )
    p.add_argument("--tflops", type=positive, default=790.0, help="of GEMMs of whatever dtype; default 790")
    p.add_argument("--sdpa-tflops", type=positive, default=500.0, help="of attention; default 500")
    p.add_argument("--gbps", type=positive, default=4300.0, help="memory bandwidth in GB/s; default 4300")
    p.add_argument("--json", type=Path, metavar="OUT", help="write every operator of every site here")
    p.add_argument("--render", type=Path, metavar="FILE", help="draw a file written by --json instead of tracing")
    p.add_argument("--out", type=Path, metavar="PNG", help="where --render draws to")
    return p


def main(argv: list[str] | None = None) -> int:
    options = parser().parse_args(argv)
    if (options.render is None) != (options.out is None):
        parser().error("--render FILE and --out PNG go together")
    if options.render is not None:
        draw(json.loads(options.render.read_text()), options.out)
        return 0
    work, rates = work_of(options, parser()), Rates(options.tflops, options.sdpa_tflops, options.gbps)
    document: dict[str, Any] = {
        "environment": report.environment(torch.device("cpu"))
        | {name: importlib.metadata.version(name) for name in ("diffusers", "peft")},
        "work": asdict(work),
        "rates": asdict(rates),
        "results": [],
    }
    print(
        f"{work.model}, batch {work.batch}, {work.px} px, {work.text_tokens} text tokens, bf16 base, LoRA on attention"
    )
    print(
        f"predicted from shapes at {rates.tflops:g} TFLOP/s, attention {rates.sdpa_tflops:g}, {rates.gbps:g} GB/s;"
        " not measured"
    )
    for adapters in options.adapters:
        results = [measure(variant, adapters, work, rates) for variant in variants(work)]
        document["results"] += results
        print(f"\n== {adapters} adapters, {results[0]['trainable'] / 1e6:.2f} M parameters ==\n")
        print(table(results), flush=True)
    if options.json is not None:
        _write(document, options.json)
        print(f"wrote {options.json}", file=sys.stderr)
    return 0


def _write(document: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    head = json.dumps({name: value for name, value in document.items() if name != "results"})
    results = ",\n".join(map(json.dumps, document["results"]))  # a result a line
    path.write_text(f'{head[:-1]}, "results": [\n{results}\n]}}\n')


if __name__ == "__main__":
    sys.exit(main())
