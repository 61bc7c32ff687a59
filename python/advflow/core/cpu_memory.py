"""Keeping freed memory on the CPU.

By default glibc hands every large tensor's pages back to the system when it is freed and faults them in again for the
next one. On activations of a few megabytes that costs more than the arithmetic of an elementwise operator.
"""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


def keep_freed_memory() -> None:
    """Tells glibc to keep up to 2 GiB of freed memory for reuse; does nothing where the C library is another."""
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
        libc.mallopt(_M_TOP_PAD, 1 << 28)
