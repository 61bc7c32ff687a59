"""From measurements to a table for people and a JSON for machines.

``python -m advflow_ext.bench.harness.report FILE`` writes what is known of the machine alone.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import advflow_ext as af
from advflow_ext import _native
from advflow_ext.bench.harness.registry import OURS
from advflow_ext.conformance.rows import SOURCES
from advflow_ext.kernels import triton_ops

Row = dict[str, Any]


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())


def commit() -> str:
    """What ADVFLOW_COMMIT says was measured, in a copy of a tree; else git's, with ``+changes`` where there are any; of
    what was installed that of the build."""
    if named := os.environ.get("ADVFLOW_COMMIT"):
        return named
    root = Path(__file__).resolve().parents[3]
    if not (root / "csrc").is_dir():  # installed, perhaps inside of another repository
        return str((_native.build_info() or {}).get("commit") or "unknown")[:12]

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True).stdout

    try:
        return git("rev-parse", "--short=12", "HEAD").strip() + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def slug(name: str) -> str:
    """``"NVIDIA H200"`` -> ``"nvidia-h200"``."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def nvidia_smi(*fields: str) -> dict[str, str]:
    """What the driver says of the first device; empty where nvidia-smi is missing or refuses."""
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(fields, map(str.strip, answer.strip().split(",")), strict=False))


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def environment(device: torch.device) -> dict[str, Any]:
    gpu = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        gpu = {
            "name": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "driver": nvidia_smi("driver_version", "power.limit", "clocks.max.sm", "clocks.max.memory"),
        }
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "device": device.type,
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "gpu": gpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": installed("triton"),
        "build": _native.build_info(),
        "advflow_ext": af.__version__,
        # False: "ours" is the reference itself, and its row measures nothing new.
        "native": _native.serves(torch.empty(1, device=device)),
        # The same of a block's ops, lora_linear aside.
        "triton_kernels": triton_ops.serves(torch.empty(1, device=device)),
    }


def speedup(rows: list[Row], name: str, clock: str = "times") -> float | None:
    """How many times faster ours is than ``name``; None unless both were measured and both are correct."""
    by_name = {row["implementation"]: row for row in rows}
    ours, other = by_name.get(OURS), by_name.get(name)
    if ours is None or other is None or not (ours["check"]["green"] and other["check"]["green"]):
        return None
    if ours.get(clock) is None or other.get(clock) is None:
        return None
    return float(other[clock]["median"] / ours[clock]["median"])


def clock_of(rows: list[Row]) -> str:
    """Where graphs were replayed, they time the device and not the host."""
    return "graph_times" if any(row.get("graph_times") for row in rows) else "times"


def table(result: dict[str, Any], copy_bandwidth: float) -> str:
    """One case of a report for a terminal."""
    rows, bytes_moved, latent = result["implementations"], result["bytes_moved"], result["gradient_bytes"]
    clock = clock_of(rows)
    graphs = clock == "graph_times"
    header = f"{'':20} {'correct':>9} {'median':>9} {'q20..q80 (ms)':>17} {'GB/s':>7} {'of copy':>7} {'memory':>7}"
    title = result["case"]["name"]
    if result["source"] is not None:
        title += f", public: {SOURCES[result['source']]}"
    lines = [title, header + (f" {'graph ms':>9}" if graphs else "") + f" {'ours is':>8}"]
    for row in rows:
        check = row["check"]
        if row.get("error"):
            lines.append(f"{row['implementation']:20} failed: {row['error']}")
            continue
        times = row["times"]
        line = f"{row['implementation']:20} {'yes' if check['green'] else 'NO':>9} {1e3 * times['median']:9.3f}"
        line += f" {1e3 * times['q20']:8.3f}..{1e3 * times['q80']:7.3f}"
        seconds = (row.get(clock) or times)["median"]
        rate = bytes_moved / seconds
        line += f" {rate / 1e9:7.1f} {100 * rate / copy_bandwidth:6.0f}%"
        line += f" {row['peak_extra_bytes'] / latent:6.2f}g"
        if graphs:
            line += f" {1e3 * row['graph_times']['median']:9.4f}" if row.get("graph_times") else f" {'-':>9}"
        if row["implementation"] != OURS:
            ratio = speedup(rows, row["implementation"], clock)
            line += f" {'-' if ratio is None else f'{ratio:.2f}x':>8}"
        line += "" if row[clock if row.get(clock) else "times"]["steady"] else "  unsteady"
        lines.append(line)
        if not check["green"]:
            lines.append(
                f"{'':20} numbers off by {check['numbers_error']:.2e} of {check['numbers_limit']:.2e} allowed,"
                f" latents by {check['latents_error']:.2e} of {check['latents_limit']:.2e}"
            )
    return "\n".join(lines)


def write(document: dict[str, Any], path: Path) -> None:
    """Whole or not at all, so that a run that is cut short leaves what it had."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(document, indent=1) + "\n")
    unfinished.replace(path)


if __name__ == "__main__":
    described = environment(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    print(json.dumps(described, indent=1))
    write(described, Path(sys.argv[1]))
