"""What the compiler made of the kernels: wide accesses where alignment allows, and nothing in local memory."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest
from kernel_harness import ROOT, SOURCE, compiled, nvcc

pytestmark = pytest.mark.skipif(nvcc() is None, reason="no nvcc: nothing to compile the CUDA source with")

FLAGS = f"-O3 -std=c++17 -I{ROOT / 'csrc'}"


@dataclass(frozen=True)
class Kernel:
    name: str
    vector: bool
    tensors: int  # v and target, and the optional ones it was built for
    body: str


def parse_kernel(symbol: str, body: str) -> Kernel:
    name = next(n for n in ["residual_stats_finish", "residual_stats", "residual_grad"] if f"{n}_kernel" in symbol)
    flags = re.search(r"VariantILb([01])ELb([01])ELb([01])ELb([01])E", symbol)
    if flags is None:
        return Kernel(name, False, 0, body)
    vector, *optional = (int(flag) for flag in flags.groups())
    return Kernel(name, bool(vector), 2 + sum(optional), body)


@pytest.fixture(scope="session", params=["80", "90"])
def arch(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def ptx_kernels(arch: str) -> list[Kernel]:
    path = compiled(f"residual_sm{arch}.ptx", f"{nvcc()} {FLAGS} -arch=compute_{arch} --ptx {SOURCE} -o".split())
    entries = re.findall(r"\.entry (\w+)\((.*?)\n\}\n", path.read_text(), re.DOTALL)
    return [parse_kernel(symbol, body) for symbol, body in entries]


@pytest.fixture(scope="session")
def ptxas_report(arch: str) -> str:
    path = compiled(
        f"residual_sm{arch}.cubin", f"{nvcc()} {FLAGS} -arch=sm_{arch} -Xptxas -v -cubin {SOURCE} -o".split()
    )
    return path.with_suffix(".log").read_text()


def test_every_variant_is_compiled(ptx_kernels: list[Kernel]) -> None:
    names = [kernel.name for kernel in ptx_kernels]
    assert (names.count("residual_stats"), names.count("residual_grad")) == (16, 16)
    assert names.count("residual_stats_finish") == 1


def test_vector_kernels_read_each_tensor_in_16_byte_words(ptx_kernels: list[Kernel]) -> None:
    for kernel in (k for k in ptx_kernels if k.vector):
        loads = re.findall(r"ld\.global\.(\S+)", kernel.body)
        wide = [load for load in loads if "v4" in load]
        # One word for 16-bit elements, a second for fp32; coefficients are the only other loads.
        assert len(wide) == 2 * kernel.tensors, kernel.name
        narrow = len(loads) - len(wide)
        assert narrow <= (3 if kernel.name == "residual_grad" else 0)


def test_vector_gradients_are_stored_in_16_byte_words(ptx_kernels: list[Kernel]) -> None:
    for kernel in (k for k in ptx_kernels if k.vector and k.name == "residual_grad"):
        stores = re.findall(r"st\.global\.(\S+)", kernel.body)
        assert len(stores) == 2 and all("v4" in store for store in stores)


def test_all_loads_are_issued_before_the_first_conversion(ptx_kernels: list[Kernel]) -> None:
    for kernel in (k for k in ptx_kernels if k.vector):
        assert kernel.body.rindex("ld.global") < kernel.body.index("cvt.f32.f16"), kernel.name


def test_nothing_spills(ptxas_report: str) -> None:
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", ptxas_report)
    assert len(frames) == 33
    assert set(frames) == {("0", "0", "0")}


def test_registers_leave_room_for_latency_hiding(ptxas_report: str) -> None:
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", ptxas_report)]
    # 80 registers let three blocks of 256 threads share a multiprocessor.
    assert len(registers) == 33 and max(registers) <= 80
