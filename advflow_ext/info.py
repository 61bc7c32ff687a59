"""``python -m advflow_ext.info``: what was built, for what, and what of it is usable here."""

from __future__ import annotations

import platform

import torch

import advflow_ext
from advflow_ext import _native


def report() -> str:
    lines = [
        f"advflow_ext {advflow_ext.__version__}, torch {torch.__version__}, Python {platform.python_version()}",
        f"imported from {_native.PACKAGE}",
        *([] if _native.module is None else [f"compiled module {_native.module.__file__}"]),
        "",
        "built",
    ]
    built = _native.build_info()
    if built is None:
        lines.append(f"  nothing usable: {_native.problem}")
    else:
        width = max(map(len, built))
        for key, value in built.items():
            lines.append(f"  {key:<{width}}  {' '.join(value) if isinstance(value, list) else value}")
    lines += ["", "usable here", f"  cpu   {'native kernels' if 'cpu' in _native.DEVICES else 'PyTorch reference'}"]
    lines.append(f"  cuda  {_cuda()}")
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
