"""Builds a kernel file on its own and calls its launchers through ctypes, without torch's dispatcher between.

The same calls serve two builds of the same source: g++ with the launch shim (CPU tensors) and nvcc (CUDA tensors).
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
SHIM = Path(__file__).resolve().parent / "shim"
SOURCE = ROOT / "csrc" / "cuda" / "residual.cu"

STATS = 8
UNSUPPORTED_DTYPE = 1

_DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
_GUARD = 64


def nvcc() -> str | None:
    cuda_home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc") or (shutil.which("nvcc", path=os.path.join(cuda_home, "bin")) if cuda_home else None)


def compiled(name: str, command: list[str]) -> Path:
    """Runs ``command`` + [output path] unless an output of the same sources and command is there already."""
    digest = hashlib.sha256(repr(command).encode())
    for source in sorted([*(ROOT / "csrc").rglob("*"), *SHIM.rglob("*")]):
        if source.suffix in {".h", ".cuh", ".cu"}:
            digest.update(source.read_bytes())
    folder = Path(tempfile.gettempdir()) / f"advflow-kernel-tests-{os.getuid()}" / digest.hexdigest()[:16]
    output = folder / name
    if not output.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f"{name}.{os.getpid()}"
        done = subprocess.run([*command, str(partial)], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
        output.with_suffix(".log").write_text(done.stdout + done.stderr)
        partial.rename(output)
    return output


def build_shim(source: Path = SOURCE) -> Path:
    # -ffp-contract=off: otherwise g++ decides per instantiation, on some targets, where to fuse a multiply-add.
    return compiled(
        f"{source.stem}_shim.so",
        f"{os.environ.get('CXX', 'g++')} -x c++ -std=c++17 -O2 -ffp-contract=off -fPIC -shared -U_FORTIFY_SOURCE"
        f" -Wall -Wextra -Werror -Wno-unknown-pragmas -I{SHIM} -I{ROOT / 'csrc'} {source} -o".split(),
    )


def build_cuda() -> Path:
    major, minor = torch.cuda.get_device_capability()
    return compiled(
        "residual_cuda.so",
        f"{nvcc()} -O3 -std=c++17 -arch=sm_{major}{minor} -shared -Xcompiler -fPIC"
        f" -I{ROOT / 'csrc'} {SOURCE} -o".split(),
    )


def poisoned(numel: int, dtype: torch.dtype, device: str, offset: int = 0) -> torch.Tensor:
    """``numel`` NaNs inside a larger NaN-filled buffer, ``offset`` elements past a well-aligned address."""
    storage = torch.full((_GUARD + offset + numel + _GUARD,), float("nan"), dtype=dtype, device=device)
    return storage[_GUARD + offset : _GUARD + offset + numel]


def placed(values: torch.Tensor, device: str, offset: int = 0) -> torch.Tensor:
    """A copy of ``values`` surrounded by NaN, so that a read outside it shows in the result."""
    where = poisoned(values.numel(), values.dtype, device, offset)
    return where.copy_(values.reshape(-1)).view(values.shape)


def guards_intact(tensor: torch.Tensor) -> bool:
    storage = tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0)
    begin, end = tensor.storage_offset(), tensor.storage_offset() + tensor.numel()
    return bool(storage[:begin].isnan().all() and storage[end:].isnan().all())


@dataclass(frozen=True)
class Inputs:
    v: torch.Tensor  # [batch, elements], like all of them
    target: torch.Tensor
    noise: torch.Tensor | None = None
    v_old: torch.Tensor | None = None
    v_ref: torch.Tensor | None = None
    mix: float = 0.0
    target_is_eps: bool = False

    def tensors(self) -> dict[str, torch.Tensor | None]:
        return {name: getattr(self, name) for name in ("v", "target", "noise", "v_old", "v_ref")}

    def map(self, f) -> Inputs:  # type: ignore[no-untyped-def]
        present = {name: f(tensor) for name, tensor in self.tensors().items() if tensor is not None}
        return replace(self, **present)  # type: ignore[arg-type]

    @property
    def shape(self) -> tuple[int, int]:
        batch, elements = self.v.shape
        return batch, elements


class _CTensor(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("dtype", ctypes.c_int32)]


class _CInputs(ctypes.Structure):
    _fields_ = [
        *((name, _CTensor) for name in ("v", "target", "noise", "v_old", "v_ref")),
        ("batch", ctypes.c_int64),
        ("elements", ctypes.c_int64),
        ("mix", ctypes.c_double),
        ("target_is", ctypes.c_int32),
    ]


def _c_inputs(inputs: Inputs) -> _CInputs:
    tensors = inputs.tensors().values()
    c_tensors = (_CTensor(None, 0) if t is None else _CTensor(t.data_ptr(), _DTYPE_CODES[t.dtype]) for t in tensors)
    target_is = 2 if inputs.target_is_eps else int(inputs.noise is not None)
    return _CInputs(*c_tensors, *inputs.shape, inputs.mix, target_is)


class ResidualKernels:
    def __init__(self, library: Path, device: str) -> None:
        self.device = device
        self._lib = ctypes.CDLL(str(library))
        pointer, count = ctypes.c_void_p, ctypes.c_int64
        self._lib.advflow_residual_stats_workspace_cuda.argtypes = [count, count]
        self._lib.advflow_residual_stats_workspace_cuda.restype = count
        self._lib.advflow_residual_stats_cuda.argtypes = [ctypes.POINTER(_CInputs), pointer, pointer, pointer]
        self._lib.advflow_residual_grad_cuda.argtypes = [ctypes.POINTER(_CInputs), pointer, pointer, pointer]

    def _stream(self) -> int | None:
        return torch.cuda.current_stream().cuda_stream if self.device == "cuda" else None

    def workspace_bytes(self, batch: int, elements: int) -> int:
        return int(self._lib.advflow_residual_stats_workspace_cuda(batch, elements))

    def try_stats(self, inputs: Inputs, workspace: torch.Tensor, stats: torch.Tensor) -> int:
        return int(
            self._lib.advflow_residual_stats_cuda(
                ctypes.byref(_c_inputs(inputs)), workspace.data_ptr(), stats.data_ptr(), self._stream()
            )
        )

    def try_grad(self, inputs: Inputs, coef: torch.Tensor, grad: torch.Tensor) -> int:
        return int(
            self._lib.advflow_residual_grad_cuda(
                ctypes.byref(_c_inputs(inputs)), coef.data_ptr(), grad.data_ptr(), self._stream()
            )
        )

    def stats(self, inputs: Inputs) -> torch.Tensor:  # [batch, STATS]
        batch, elements = inputs.shape
        workspace = poisoned(self.workspace_bytes(batch, elements) // 4, torch.float32, self.device)
        stats = poisoned(batch * STATS, torch.float32, self.device)
        status = self.try_stats(inputs, workspace, stats)
        assert status == 0, f"residual_stats returned {status}"
        assert guards_intact(workspace) and guards_intact(stats), "residual_stats wrote outside its buffers"
        return stats.view(batch, STATS)

    def grad(self, inputs: Inputs, coef: torch.Tensor, offset: int = 0) -> torch.Tensor:  # [batch, elements]
        grad = poisoned(inputs.v.numel(), inputs.v.dtype, self.device, offset)
        status = self.try_grad(inputs, coef, grad)
        assert status == 0, f"residual_grad returned {status}"
        assert guards_intact(grad), "residual_grad wrote outside its output"
        return grad.view(inputs.shape)
