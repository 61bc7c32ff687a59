from __future__ import annotations

import os
import shutil

import pytest
import torch
from kernel_harness import ResidualKernels, build_cuda, build_shim, nvcc


@pytest.fixture(scope="session", params=["shim", pytest.param("cuda", marks=pytest.mark.gpu)], ids=["shim", "cuda"])
def kernels(request: pytest.FixtureRequest) -> ResidualKernels:
    """The launchers of residual.cu, run by the launch shim and, where there is a GPU, by the GPU."""
    if request.param == "shim":
        if shutil.which(os.environ.get("CXX", "g++")) is None:
            pytest.skip("the launch shim needs g++")
        return ResidualKernels(build_shim(), "cpu")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if nvcc() is None:
        pytest.skip("no nvcc")
    return ResidualKernels(build_cuda(), "cuda")
