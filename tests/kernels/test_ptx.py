"""What the compiler made of the kernels: wide accesses where alignment allows, and nothing in local memory."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.kernels.kernel_harness import LOSS, LOSS_SUMMARY, RESIDUAL, ROOT, SDE_STEP, compiled, nvcc

pytestmark = pytest.mark.skipif(nvcc() is None, reason="no nvcc: nothing to compile the CUDA source with")

FLAGS = f"-O3 -std=c++17 -I{ROOT / 'csrc'}"

STEPS = ("sde_step", "transition_deviation_sq", "transition_deviation")
NAMES = ["row_means", "residual_stats", "residual_grad", *STEPS, "loss_summary", "loss"]
# kVector, what the row is compared with (an AdvflowTarget), v_old, v_ref
RESIDUAL_VARIANT = r"VariantILb([01])EL13AdvflowTarget([012])ELb([01])ELb([01])E"
X0, EPS = 1, 2
# kVector; of the step kDrawn, kNarrow
STEP_VARIANT = r"_kernelILb([01])E(?:Lb([01])ELb([01])E)?"


@dataclass(frozen=True)
class Kernel:
    name: str
    vector: bool
    loads: int  # of words of 16 bytes: one of 16-bit elements, a second for fp32 where a tensor may be that
    scalars: int  # the other loads: coefficients, an upstream gradient, a seed, a mix
    words: int  # of 16 bytes that it writes
    body: str
    streams: bool = False  # what it writes is the first to leave the cache


def parse_kernel(symbol: str, body: str) -> Kernel:
    name = next(n for n in NAMES if f"{n}_kernel" in symbol)
    if name in ("row_means", "loss_summary", "loss"):
        return Kernel(name, False, 0, 0, 0, body)
    flags = re.search(STEP_VARIANT if name in STEPS else RESIDUAL_VARIANT, symbol)
    assert flags is not None, symbol
    vector, *rest = (int(flag or 0) for flag in flags.groups())
    if name == "sde_step":
        drawn, narrow = rest
        tensors = 2 + (not drawn)
        # x_next in one word or, as fp32 and in pairs of lanes, two; eps, fp32, in two.
        words = 1 + 2 if narrow else 3 + 2
        return Kernel(name, bool(vector), tensors if narrow else 2 * tensors, 3 + drawn, words, body, not narrow)
    if name in STEPS:
        return Kernel(name, bool(vector), 2 * 3, 4, 3 if name == "transition_deviation" else 0, body)
    target, *anchors = rest
    grad = name == "residual_grad"
    # The square of eps alone is no matter of v.
    tensors = 2 + (target == X0) + sum(anchors) - (not grad and target == EPS and not any(anchors))
    return Kernel(name, bool(vector), 2 * tensors, 4 if grad else 1, 3 if grad else 0, body)


@dataclass(frozen=True)
class Build:
    kernels: list[Kernel]
    report: str  # what ptxas said


@functools.cache
def build(source: Path, arch: str) -> Build:
    name = f"{source.stem}_sm{arch}"
    ptx = compiled(f"{name}.ptx", f"{nvcc()} {FLAGS} -arch=compute_{arch} --ptx {source} -o".split())
    cubin = compiled(f"{name}.cubin", f"{nvcc()} -arch=sm_{arch} -Xptxas -v -cubin {ptx} -o".split())
    entries = re.findall(r"\.entry (\w+)\((.*?)\n\}\n", ptx.read_text(), re.DOTALL)
    kernels = [parse_kernel(symbol, body) for symbol, body in entries]
    return Build(kernels, cubin.with_suffix(".log").read_text())


@pytest.fixture(params=["80", "90"])
def arch(request: pytest.FixtureRequest) -> str:
    return str(request.param)


SOURCES = (RESIDUAL, SDE_STEP, LOSS_SUMMARY, LOSS)


@pytest.fixture(params=SOURCES, ids=lambda source: source.stem)
def built(request: pytest.FixtureRequest, arch: str) -> Build:
    return build(request.param, arch)


def test_every_variant_is_compiled(arch: str) -> None:
    names = [kernel.name for source in SOURCES for kernel in build(source, arch).kernels]
    assert {name: names.count(name) for name in NAMES} == {
        "row_means": 2,
        "residual_stats": 24,
        "residual_grad": 24,
        "sde_step": 8,
        "transition_deviation_sq": 2,
        "transition_deviation": 2,
        "loss_summary": 1,
        "loss": 6,
    }


def test_vector_kernels_read_each_tensor_in_16_byte_words(built: Build) -> None:
    for kernel in (k for k in built.kernels if k.vector):
        loads = re.findall(r"ld\.global\.(\S+)", kernel.body)
        wide = [load for load in loads if "v4" in load]
        assert len(wide) == kernel.loads, kernel.name
        assert len(loads) - len(wide) <= kernel.scalars, kernel.name


@pytest.mark.parametrize(
    ("source", "name", "scalars"),
    [
        (RESIDUAL, "residual_grad", 0),
        (SDE_STEP, "sde_step", 1),
        (SDE_STEP, "transition_deviation_sq", 1),
        (SDE_STEP, "transition_deviation", 0),
    ],
)
def test_vector_kernels_store_in_16_byte_words(arch: str, source: Path, name: str, scalars: int) -> None:
    kernels = [k for k in build(source, arch).kernels if k.vector and k.name == name]
    assert kernels
    for kernel in kernels:
        stores = re.findall(r"st\.global\.(\S+)", kernel.body)
        wide = [store for store in stores if "v4" in store]
        assert len(wide) == kernel.words
        assert all(store.startswith("cs.") == kernel.streams for store in wide)
        assert len(stores) == kernel.words + scalars


def test_all_loads_are_issued_before_the_first_conversion(built: Build) -> None:
    for kernel in (k for k in built.kernels if k.vector):
        assert kernel.body.rindex("ld.global") < kernel.body.index("cvt.f32.f16"), kernel.name


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_a_kernel_launched_early_reads_and_writes_nothing_before_it_has_waited(source: Path) -> None:
    """And nothing by loads that the compiler and the cache may take for constant."""
    early = ("row_means", "residual_stats", "residual_grad", "loss")
    for kernel in build(source, "90").kernels:
        before, waits, _ = kernel.body.partition("griddepcontrol.wait")
        assert bool(waits) == (kernel.name in early), kernel.name
        if waits:
            assert not re.search(r"\b(ld|st|atom|red|cp)\.(?!param|shared)", before), kernel.name
            assert ".nc" not in kernel.body, kernel.name


def test_nothing_spills(built: Build) -> None:
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", built.report)
    assert len(frames) == len(built.kernels)
    assert set(frames) == {("0", "0", "0")}


def test_registers_leave_room_for_latency_hiding(built: Build) -> None:
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", built.report)]
    assert len(registers) == len(built.kernels)
    # 80 registers let three blocks of 256 threads share a multiprocessor.
    assert max(registers) <= 80
