from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from tests.kernels.kernel_harness import (
    LOSS,
    LOSS_SUMMARY,
    RESIDUAL,
    SDE_STEP,
    LossKernels,
    ResidualKernels,
    SdeStepKernels,
    SummaryKernels,
    build_cuda,
    build_shim,
    nvcc,
)

BUILDS = ["shim", pytest.param("cuda", marks=pytest.mark.gpu)]


def library(source: Path, build: str) -> tuple[Path, str]:
    """The launchers of ``source`` and their device: run by the launch shim and, where there is a GPU, by the GPU."""
    if build == "shim":
        if shutil.which(os.environ.get("CXX", "g++")) is None:
            pytest.skip("the launch shim needs g++")
        return build_shim(source), "cpu"
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if nvcc() is None:
        pytest.skip("no nvcc")
    return build_cuda(source), "cuda"


@pytest.fixture(scope="session", params=BUILDS, ids=["shim", "cuda"])
def kernels(request: pytest.FixtureRequest) -> ResidualKernels:
    return ResidualKernels(*library(RESIDUAL, request.param))


@pytest.fixture(scope="session", params=BUILDS, ids=["shim", "cuda"])
def sde_kernels(request: pytest.FixtureRequest) -> SdeStepKernels:
    return SdeStepKernels(*library(SDE_STEP, request.param))


@pytest.fixture(scope="session", params=BUILDS, ids=["shim", "cuda"])
def summary_kernels(request: pytest.FixtureRequest) -> SummaryKernels:
    return SummaryKernels(*library(LOSS_SUMMARY, request.param))


@pytest.fixture(scope="session", params=BUILDS, ids=["shim", "cuda"])
def loss_kernels(request: pytest.FixtureRequest) -> tuple[ResidualKernels, LossKernels]:
    return ResidualKernels(*library(RESIDUAL, request.param)), LossKernels(*library(LOSS, request.param))
