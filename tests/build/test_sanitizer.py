"""``make sanitize``: the operators' tests with the module's own code under AddressSanitizer and UBSan.

Built by setup.py into build/sanitizer, apart from the module in use; a report of either sanitizer ends the run.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "sanitizer"
CXX = os.environ.get("CXX", "c++").split()

pytestmark = [
    pytest.mark.sanitizer,
    pytest.mark.skipif(shutil.which(CXX[0]) is None, reason="nothing to compile with"),
]

OPS = [
    "kernels/test_raw_ops",
    "ops/test_batch_slices",
    "kernels/test_residual",
    "kernels/test_loss_summary",
    "kernels/test_sde_step_op",
    "ops/test_gaussian_kl",
    "ops/test_advantage_flow",
    "ops/test_flow_dppo",
]
# Tracing runs for minutes in code of others, the statistics of the noise are no question of memory, and rows gigabytes
# apart have gigabytes of shadow.
LEFT_OUT = ("compile", "export", "opcheck", "moments", "distribution", "tails", "far_apart")


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    merged = {**os.environ, **environment}
    return subprocess.run(
        command, cwd=ROOT, env=merged, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )


@pytest.fixture(scope="module")
def sanitized() -> dict[str, str]:
    """Builds, and gives the environment in which Python loads that build."""
    folders = ["--build-base", str(BUILD), "--build-lib", str(BUILD / "lib"), "--build-temp", str(BUILD / "temp")]
    built = run(sys.executable, "setup.py", "-q", "build", *folders, ADVFLOW_SANITIZE="1", ADVFLOW_CUDA="0")
    assert built.returncode == 0, built.stdout
    # The interpreter is not instrumented, so the runtimes have to be there before anything allocates.
    runtimes = [run(*CXX, f"-print-file-name={name}").stdout.strip() for name in ("libasan.so", "libubsan.so")]
    return {
        "LD_PRELOAD": " ".join(str(Path(name).resolve()) for name in runtimes),
        "PYTHONPATH": str(BUILD / "lib"),
        # Python leaves its own allocator's memory to the end of the process, and so do PyTorch's singletons.
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        # Small blocks of Python's own allocator would hide an overrun.
        "PYTHONMALLOC": "malloc",
        "OMP_NUM_THREADS": "2",
    }


def test_the_build_is_the_one_that_is_loaded(sanitized: dict[str, str]) -> None:
    found = run(sys.executable, "-P", "-c", "import advflow_ext._C as c; print(c.__file__)", **sanitized)
    assert Path(found.stdout.strip().splitlines()[-1]).is_relative_to(BUILD), found.stdout


FAULTS = {
    # What loss_summary once did with half statistics: float32 written to half as much memory.
    "heap-buffer-overflow": "void fault(float* data) { for (int i = 0; i < 64; ++i) data[i] = 1.0f; }",
    "shift exponent 40 is too large": "int fault(const int* data) { return 1 << (data[0] + 40); }",
}


@pytest.mark.parametrize("report", FAULTS)
def test_a_fault_is_reported(sanitized: dict[str, str], tmp_path: Path, report: str) -> None:
    """In memory that PyTorch allocated, as an operator's outputs are."""
    source, library = tmp_path / "fault.cpp", tmp_path / "fault.so"
    source.write_text(f'extern "C" {FAULTS[report]}\n')
    from_setup = "import setup; print(' '.join(setup.SANITIZER_FLAGS))"
    flags = run(sys.executable, "-c", from_setup).stdout.split()
    built = run(*CXX, *flags, "-fPIC", "-shared", str(source), "-o", str(library))
    assert built.returncode == 0, built.stdout
    call = f"""
import ctypes, torch
half = torch.zeros(64, dtype=torch.float16)
ctypes.CDLL({str(library)!r}).fault(ctypes.c_void_p(half.data_ptr()))
"""
    result = run(sys.executable, "-P", "-c", call, **sanitized)
    assert result.returncode != 0 and report in result.stdout, result.stdout


def test_the_operators_are_clean(sanitized: dict[str, str]) -> None:
    result = run(
        sys.executable, "-P", "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not slow and not gpu",
        "-k", " and ".join(f"not {word}" for word in LEFT_OUT), *(f"tests/{name}.py" for name in OPS), **sanitized,
    )  # fmt: skip
    assert result.returncode == 0 and " passed" in result.stdout, result.stdout[-8000:]
