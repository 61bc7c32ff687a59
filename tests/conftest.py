"""Fixtures and settings every test shares."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, settings

from advflow_ext.contract import outputs
from advflow_ext.policies import cuda_graphs

# For bench, a folder of the repository. At the end: what is installed is tested before what lies beside the tests.
sys.path.append(str(Path(__file__).resolve().parents[1]))

# Deterministic algorithms, which poisoned_memory switches on, need this of cuBLAS, before its first use.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# The same examples in every run: a red test on one machine is red on all.
settings.register_profile(
    "ci", max_examples=60, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("ci")

# Triton decides when it is first imported whether it compiles or interprets, and many things import it. Where there is
# no GPU it interprets; kernels_serve_here says when our kernels may make use of that.
if not torch.cuda.is_available() and importlib.util.find_spec("triton") is not None:
    with mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1"}):
        import triton  # noqa: F401

# Marked, so that "-m gpu" is all that a GPU can be asked.
DEVICES = ["cpu", *([pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("peers") and "PEERS" not in os.environ:
            item.add_marker(pytest.mark.skip(reason="needs the trainers' checkouts: make test-peers PEERS=folder"))
        if not torch.cuda.is_available():
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        elif "kernels_serve_here" in item.fixturenames:  # type: ignore[attr-defined]
            item.add_marker(pytest.mark.gpu)  # on it these run, so that "-m gpu" has to find them


@pytest.fixture(scope="module")
def kernels_serve_here() -> Iterator[None]:
    """Triton's kernels run on the GPU where there is one, in Triton's interpreter elsewhere."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        yield
        return
    from tests.triton_interpreter import serving  # needs numpy, which torch does without

    with serving():
        yield


@pytest.fixture(autouse=True)
def forget_warnings() -> Iterator[None]:
    """What is said once in a process is said once in each test."""
    outputs._already_warned.clear()
    yield


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], None]]:
    """What :class:`advflow_ext.CudaGraphs` has recorded. Without a GPU, what a graph would replay is run again."""
    made: list[Callable[[], None]] = []
    stock = cuda_graphs.record

    def record(run: Callable[[], None], pool: Any) -> Callable[[], None]:
        made.append(run)
        if torch.cuda.is_available():
            return stock(run, pool)
        run()
        learns = torch.is_grad_enabled()

        def replay() -> None:
            with torch.set_grad_enabled(learns):
                run()

        return replay

    monkeypatch.setattr(cuda_graphs, "record", record)
    if not torch.cuda.is_available():
        monkeypatch.setattr(cuda_graphs, "can_record", lambda tensors: True)
        monkeypatch.setattr(cuda_graphs, "on_a_side_stream", lambda run: run())
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    return made


@pytest.fixture(scope="module")
def poisoned_memory() -> Iterator[None]:
    """Fills every torch.empty with NaN, so that an element nobody wrote is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before)
