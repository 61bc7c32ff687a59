"""``python -m advflow_ext.info``: what was built, for what, and what of it is usable here."""

from __future__ import annotations

import platform
from typing import Any

import torch

import advflow_ext
from advflow_ext import _native


def facts() -> dict[str, Any]:
    """``built`` is None where nothing of it is usable, and ``problem`` says why."""
    return {
        "advflow_ext": advflow_ext.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "package": str(_native.PACKAGE),
        "module": None if _native.module is None else str(_native.module.__file__),
        "built": _native.build_info(),
        "problem": _native.problem,
        "usable": {"cpu": "native kernels" if "cpu" in _native.DEVICES else "PyTorch reference", "cuda": _cuda()},
    }


def report() -> str:
    known = facts()
    lines = [
        f"advflow_ext {known['advflow_ext']}, torch {known['torch']}, Python {known['python']}",
        f"imported from {known['package']}",
        *([] if known["module"] is None else [f"compiled module {known['module']}"]),
        "",
        "built",
    ]
    if known["built"] is None:
        lines.append(f"  nothing usable: {known['problem']}")
    else:
        width = max(map(len, known["built"]))
        for key, value in known["built"].items():
            lines.append(f"  {key:<{width}}  {' '.join(value) if isinstance(value, list) else value}")
    lines += ["", "usable here", *(f"  {device:<4}  {kernels}" for device, kernels in known["usable"].items())]
    return "\n".join(lines)


def _cuda() -> str:
    if "cuda" in _native.DEVICES:
        kernels = "native kernels"
    else:
        kernels = "PyTorch reference (no CUDA kernels were built; ADVFLOW_CUDA=1 at a reinstall insists on them)"
    if torch.version.cuda is None:
        return f"{kernels}; not usable: this torch has no CUDA"
    if not torch.cuda.is_available():
        return f"{kernels}; not usable: torch sees no CUDA device"
    return f"{kernels} on {torch.cuda.get_device_name()}"


if __name__ == "__main__":
    print(report())
