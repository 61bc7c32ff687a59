"""Which of torch's kernels a process uses, where more than one would do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

_ATTENTION = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


@contextmanager
def backends(attention: str, tf32: bool) -> Iterator[None]:
    """While it is open, the whole process asks the kernel called `attention` first, "auto" being torch's own order, and
    makes fp32 matrix products in TF32 if `tf32`.

    An order and not a choice: what flash attention cannot, such as the decoder's attention in fp32, goes on.
    """
    before = torch.get_float32_matmul_precision()
    order = sorted(_ATTENTION, key=lambda name: name != attention)
    first = sdpa_kernel([_ATTENTION[name] for name in order], set_priority=True)
    if tf32:
        torch.set_float32_matmul_precision("high")
    try:
        with nullcontext() if attention == "auto" else first:
            yield
    finally:
        torch.set_float32_matmul_precision(before)
