"""The launch shim itself: it must see the mistakes the other tests rely on it to see."""

from __future__ import annotations

import ctypes
import os
import shutil

import pytest
import torch

from tests.kernels.kernel_harness import SHIM, build_shim

pytestmark = pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="the launch shim needs g++")

INVALID_CONFIGURATION, MISALIGNED_ADDRESS, LAUNCH_FAILURE = 9, 716, 719


@pytest.fixture(scope="module")
def faults() -> ctypes.CDLL:
    return ctypes.CDLL(str(build_shim(SHIM / "faults.cu")))


def pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def test_each_fault_is_reported_and_the_next_launch_is_clean(faults: ctypes.CDLL) -> None:
    data, out = torch.zeros(64, dtype=torch.int32), torch.zeros(128, dtype=torch.int32)
    for _ in range(2):
        assert faults.divergent_barrier() == LAUNCH_FAILURE
        assert faults.misaligned_read(pointer(data), pointer(out)) == MISALIGNED_ADDRESS
        assert faults.misaligned_write(pointer(data)) == MISALIGNED_ADDRESS
        assert faults.empty_grid() == INVALID_CONFIGURATION
        assert faults.lane_numbers(pointer(out)) == 0


def test_shuffles_stay_inside_their_warp(faults: ctypes.CDLL) -> None:
    out = torch.zeros(128, dtype=torch.int32)
    assert faults.lane_numbers(pointer(out)) == 0
    first, second = sum(range(32)), sum(range(32, 64))
    assert out.tolist() == ([first] * 32 + [second] * 32) * 2
