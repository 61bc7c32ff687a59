"""What is here: machine, build, devices, packages."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

from advflow_ext import _native, info
from advflow_ext.bench.harness.report import cpu_model, installed

PACKAGES = ("torch", "triton", "diffusers", "peft", "accelerate", "transformers")
SWITCHES = ("OMP_WAIT_POLICY", "OMP_NUM_THREADS", "CUDA_HOME", "CUDA_VISIBLE_DEVICES", "TRITON_INTERPRET")


def facts() -> dict[str, Any]:
    return {
        "environment": environment(),
        "build": info.facts(),
        "devices": devices(),
        "versions": {name: installed(name) for name in PACKAGES},
    }


def environment() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "variables": {name: os.environ[name] for name in SWITCHES if name in os.environ},
        "nvidia_driver": Path("/proc/driver/nvidia/version").exists(),
    }


def devices() -> list[dict[str, Any]]:
    """The CUDA devices that torch sees."""
    if not torch.cuda.is_available():
        return []
    found = []
    for place in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(place)
        capability = (properties.major, properties.minor)
        found.append(
            {
                "name": properties.name,
                "memory_bytes": properties.total_memory,
                "architecture": f"sm_{capability[0]}{capability[1]}",
                "served": is_served(capability, (_native.build_info() or {}).get("architectures", [])),
            }
        )
    return found


def is_served(capability: tuple[int, int], architectures: list[str]) -> bool:
    """Whether kernels compiled for ``architectures``, as sm_80 or compute_90, run on a device of that capability.

    Machine code runs on devices of the same major version and no older minor one; what is compute_ the driver compiles
    for every later device. A suffix, as of sm_90a, holds for that device alone.
    """
    for architecture in architectures:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", architecture)
        if match is None:
            continue
        built = (int(match[2]), int(match[3]))
        if match[4]:
            serves = built == capability
        elif match[1] == "compute":
            serves = built <= capability
        else:
            serves = built[0] == capability[0] and built[1] <= capability[1]
        if serves:
            return True
    return False
