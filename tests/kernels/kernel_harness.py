"""Builds a kernel file on its own and calls its launchers through ctypes, without torch's dispatcher between.

The same calls serve two builds of the same source: g++ with the launch shim (CPU tensors) and nvcc (CUDA tensors).
One file, for the structures are those of csrc/launchers.h, which is one file, too.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[2]
SHIM = Path(__file__).resolve().parent / "shim"
RESIDUAL = ROOT / "csrc" / "cuda" / "residual.cu"
SDE_STEP = ROOT / "csrc" / "cuda" / "sde_step.cu"

LOSS_SUMMARY = ROOT / "csrc" / "cuda" / "loss_summary.cu"
LOSS = ROOT / "csrc" / "cuda" / "loss.cu"

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


def build_shim(source: Path) -> Path:
    # -ffp-contract=off: otherwise g++ decides per instantiation, on some targets, where to fuse a multiply-add.
    return compiled(
        f"{source.stem}_shim.so",
        f"{os.environ.get('CXX', 'g++')} -x c++ -std=c++17 -O2 -ffp-contract=off -fPIC -shared -U_FORTIFY_SOURCE"
        f" -Wall -Wextra -Werror -Wno-unknown-pragmas -I{SHIM} -I{ROOT / 'csrc'} {source} -o".split(),
    )


def build_cuda(source: Path) -> Path:
    major, minor = torch.cuda.get_device_capability()
    return compiled(
        f"{source.stem}_cuda.so",
        f"{nvcc()} -O3 -std=c++17 -arch=sm_{major}{minor} -shared -Xcompiler -fPIC"
        f" -I{ROOT / 'csrc'} {source} -o".split(),
    )


def poisoned(numel: int, dtype: torch.dtype, device: str, offset: int = 0) -> torch.Tensor:
    """``numel`` NaNs inside a larger NaN-filled buffer, ``offset`` elements past a well-aligned address."""
    storage = torch.full((_GUARD + offset + numel + _GUARD,), float("nan"), dtype=dtype, device=device)
    return storage[_GUARD + offset : _GUARD + offset + numel]


def placed(values: torch.Tensor, device: str, offset: int = 0, gap: int = 0) -> torch.Tensor:
    """A copy of ``values`` ``[batch, elements]`` surrounded by NaN, so that a read outside it shows in the result.

    ``gap`` NaNs lie between one row and the next.
    """
    batch, elements = values.shape
    where = poisoned(batch * (elements + gap), values.dtype, device, offset)
    return where.view(batch, elements + gap)[:, :elements].copy_(values)


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
    _: KW_ONLY
    mix: float = 0.0
    target_is_eps: bool = False

    def tensors(self) -> dict[str, torch.Tensor | None]:
        return {name: getattr(self, name) for name in ("v", "target", "noise", "v_old", "v_ref")}

    def map(self, f) -> Inputs:  # type: ignore[no-untyped-def]
        return replace(self, **{name: f(tensor) for name, tensor in self.tensors().items() if tensor is not None})

    @property
    def shape(self) -> tuple[int, int]:
        batch, elements = self.v.shape
        return batch, elements


@dataclass(frozen=True)
class StepInputs:
    v: torch.Tensor  # [batch, elements], like x and noise
    x: torch.Tensor
    coef: torch.Tensor  # [batch, 3]
    noise: torch.Tensor | None = None
    seeds: torch.Tensor | None = None  # int64 [batch]
    dtype: torch.dtype = torch.float32  # of x_next

    def rows(self, rows: slice) -> StepInputs:
        present = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        parts: dict[str, Any] = {name: tensor[rows].contiguous() for name, tensor in present.items()}
        return replace(self, **parts)

    def on(self, device: str, offset: int = 0) -> StepInputs:
        """A copy on the device, latents surrounded by NaN."""
        return replace(
            self,
            v=placed(self.v, device, offset),
            x=placed(self.x, device, offset),
            noise=None if self.noise is None else placed(self.noise, device, offset),
            coef=self.coef.to(device),
            seeds=None if self.seeds is None else self.seeds.to(device),
        )


class StepOutputs(NamedTuple):
    x_next: torch.Tensor  # [batch, elements]
    eps: torch.Tensor
    deviation_sq: torch.Tensor  # [batch]


@dataclass(frozen=True)
class TransitionInputs:
    v: torch.Tensor  # [batch, elements], like x and x_next
    x: torch.Tensor
    x_next: torch.Tensor
    coef: torch.Tensor  # [batch, 3]
    weight: torch.Tensor | None = None  # [batch]
    dtype: torch.dtype = torch.float32  # of eps

    def on(self, device: str, offset: int = 0) -> TransitionInputs:
        """A copy on the device, latents surrounded by NaN."""
        v, x, x_next = (placed(tensor, device, offset) for tensor in (self.v, self.x, self.x_next))
        weight = None if self.weight is None else self.weight.to(device)
        return TransitionInputs(v, x, x_next, self.coef.to(device), weight, self.dtype)


class _CTensor(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("row_stride", ctypes.c_int64), ("dtype", ctypes.c_int32)]


class _CColumn(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("stride", ctypes.c_int64)]


class _CInputs(ctypes.Structure):
    _fields_ = [
        *((name, _CTensor) for name in ("v", "target", "noise", "v_old", "v_ref")),
        ("batch", ctypes.c_int64),
        ("elements", ctypes.c_int64),
        ("mix", ctypes.c_double),
        ("target_is", ctypes.c_int32),
        ("mixes", _CColumn),
    ]


class _CStepInputs(ctypes.Structure):
    _fields_ = [
        *((name, _CTensor) for name in ("v", "x", "noise")),
        ("seeds", ctypes.c_void_p),
        ("coef", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("elements", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
    ]


class _CTransitionInputs(ctypes.Structure):
    _fields_ = [
        *((name, _CTensor) for name in ("v", "x", "x_next")),
        ("coef", ctypes.c_void_p),
        ("weight", _CColumn),
        ("batch", ctypes.c_int64),
        ("elements", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
    ]


def _c_tensor(tensor: torch.Tensor | None) -> _CTensor:
    if tensor is None:
        return _CTensor(None, 0, 0)
    row_stride = tensor.stride(0) if len(tensor) > 1 else 0
    return _CTensor(tensor.data_ptr(), row_stride, _DTYPE_CODES[tensor.dtype])


def _c_inputs(inputs: Inputs) -> _CInputs:
    target_is = 2 if inputs.target_is_eps else int(inputs.noise is not None)
    return _CInputs(*map(_c_tensor, inputs.tensors().values()), *inputs.shape, inputs.mix, target_is, _CColumn(None, 0))


def _c_step_inputs(inputs: StepInputs) -> _CStepInputs:
    seeds = None if inputs.seeds is None else inputs.seeds.data_ptr()
    latents = map(_c_tensor, (inputs.v, inputs.x, inputs.noise))
    return _CStepInputs(*latents, seeds, inputs.coef.data_ptr(), *inputs.v.shape, _DTYPE_CODES[inputs.dtype])


def _c_transition_inputs(inputs: TransitionInputs) -> _CTransitionInputs:
    latents = map(_c_tensor, (inputs.v, inputs.x, inputs.x_next))
    weight = _CColumn(None, 0) if inputs.weight is None else _c_column(inputs.weight)
    code = _DTYPE_CODES[inputs.dtype]
    return _CTransitionInputs(*latents, inputs.coef.data_ptr(), weight, *inputs.v.shape, code)


class _CReport(ctypes.Structure):
    _fields_ = [
        ("batch", ctypes.c_int64),
        *((name, ctypes.c_double) for name in ("divisor", "largest_gradient")),
        *((name, ctypes.c_int32) for name in ("mean_count", "stat_count")),
        *((name, ctypes.c_bool) for name in ("largest", "per_sample", "eps_first", "contrast", "ratio")),
    ]


class _CSummaryInputs(ctypes.Structure):
    _fields_ = [
        ("means", _CColumn * 8),
        ("required", _CColumn * 4),
        ("advantages", _CColumn),
        ("extreme", _CColumn),
        *((name, ctypes.c_void_p) for name in ("stats", "coef", "valid", "flagged")),
        *((name, ctypes.c_int32) for name in ("required_count", "dtype")),
        *((name, _CColumn) for name in ("log_ratio", "log_lowest", "log_highest")),
        ("report", _CReport),
    ]


class _CNumber(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
        ("number", ctypes.c_double),
        ("wide", ctypes.c_bool),
    ]


class _CLossInputs(ctypes.Structure):
    _fields_ = [
        ("advantages", _CNumber),
        ("t", _CNumber),
        *((name, ctypes.c_void_p) for name in ("index", "steps")),
        ("step_rows", ctypes.c_int64),
        ("numbers", _CNumber * 4),
        ("choices", ctypes.c_int32 * 3),
        ("elements", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("loss", "dtype")),
        ("report", _CReport),
    ]


def _c_number(number: float | torch.Tensor) -> _CNumber:
    if not isinstance(number, torch.Tensor):
        return _CNumber(None, 0, number, False)
    return _CNumber(number.data_ptr(), number.stride(0) if number.dim() else 0, 0.0, number.dtype == torch.float64)


def _c_report(batch: int, reduction: str, **more: Any) -> _CReport:
    divisor = max(batch, 1) if reduction == "mean" else 1
    return _CReport(batch=batch, divisor=divisor, per_sample=reduction == "none", **more)


def _c_column(tensor: torch.Tensor) -> _CColumn:
    return _CColumn(tensor.data_ptr(), tensor.stride(0) if tensor.dim() else 0)


def _c_columns(tensors: list[torch.Tensor], most: int) -> Any:
    return (_CColumn * most)(*map(_c_column, tensors))


class Kernels:
    """One library of launchers, on the device it runs on."""

    def __init__(self, library: Path, device: str) -> None:
        self.device = device
        self._lib = ctypes.CDLL(str(library))

    def _declare(self, name: str, inputs: type[ctypes.Structure], pointers: int) -> None:
        getattr(self._lib, name).argtypes = [ctypes.POINTER(inputs), *[ctypes.c_void_p] * pointers]

    def _declare_size(self, name: str) -> None:
        function = getattr(self._lib, name)
        function.argtypes, function.restype = [ctypes.c_int64, ctypes.c_int64], ctypes.c_int64

    def _stream(self) -> int | None:
        return torch.cuda.current_stream().cuda_stream if self.device == "cuda" else None


class ResidualKernels(Kernels):
    def __init__(self, library: Path, device: str) -> None:
        super().__init__(library, device)
        self._declare_size("advflow_residual_stats_workspace_cuda")
        self._declare("advflow_residual_stats_cuda", _CInputs, pointers=3)
        self._declare("advflow_residual_partials_cuda", _CInputs, pointers=2)
        self._declare("advflow_residual_grad_cuda", _CInputs, pointers=4)

    def workspace_bytes(self, batch: int, elements: int) -> int:
        return int(self._lib.advflow_residual_stats_workspace_cuda(batch, elements))

    def try_stats(self, inputs: Inputs, workspace: torch.Tensor, stats: torch.Tensor) -> int:
        return int(
            self._lib.advflow_residual_stats_cuda(
                ctypes.byref(_c_inputs(inputs)), workspace.data_ptr(), stats.data_ptr(), self._stream()
            )
        )

    def try_grad(
        self, inputs: Inputs, coef: torch.Tensor, grad: torch.Tensor, upstream: torch.Tensor | None = None
    ) -> int:
        column = _CColumn(None, 0) if upstream is None else _c_column(upstream)
        return int(
            self._lib.advflow_residual_grad_cuda(
                ctypes.byref(_c_inputs(inputs)), coef.data_ptr(), ctypes.byref(column), grad.data_ptr(), self._stream()
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

    def partials(self, inputs: Inputs) -> torch.Tensor:
        workspace = poisoned(self.workspace_bytes(*inputs.shape) // 4, torch.float32, self.device)
        status = self._lib.advflow_residual_partials_cuda(
            ctypes.byref(_c_inputs(inputs)), workspace.data_ptr(), self._stream()
        )
        assert status == 0, f"residual_partials returned {status}"
        return workspace

    def grad(
        self, inputs: Inputs, coef: torch.Tensor, offset: int = 0, upstream: torch.Tensor | None = None
    ) -> torch.Tensor:  # [batch, elements]
        grad = poisoned(inputs.v.numel(), inputs.v.dtype, self.device, offset)
        status = self.try_grad(inputs, coef, grad, upstream)
        assert status == 0, f"residual_grad returned {status}"
        assert guards_intact(grad), "residual_grad wrote outside its output"
        return grad.view(inputs.shape)


class SdeStepKernels(Kernels):
    def __init__(self, library: Path, device: str) -> None:
        super().__init__(library, device)
        self._declare_size("advflow_sde_step_workspace_cuda")
        self._declare("advflow_sde_step_cuda", _CStepInputs, pointers=5)
        self._declare_size("advflow_transition_deviation_sq_workspace_cuda")
        self._declare("advflow_transition_deviation_sq_cuda", _CTransitionInputs, pointers=3)
        self._declare("advflow_transition_deviation_cuda", _CTransitionInputs, pointers=2)

    def workspace_bytes(self, batch: int, elements: int) -> int:
        return int(self._lib.advflow_sde_step_workspace_cuda(batch, elements))

    def try_step(self, inputs: StepInputs, workspace: torch.Tensor, outputs: StepOutputs) -> int:
        pointers = [tensor.data_ptr() for tensor in (workspace, *outputs)]
        return int(self._lib.advflow_sde_step_cuda(ctypes.byref(_c_step_inputs(inputs)), *pointers, self._stream()))

    def buffers(self, inputs: StepInputs, offset: int = 0) -> tuple[torch.Tensor, StepOutputs]:
        """Workspace and outputs full of NaN."""
        batch, elements = inputs.v.shape
        workspace = poisoned(self.workspace_bytes(batch, elements) // 4, torch.float32, self.device)
        x_next = poisoned(inputs.v.numel(), inputs.dtype, self.device, offset)
        eps = poisoned(inputs.v.numel(), torch.float32, self.device, offset)
        return workspace, StepOutputs(x_next, eps, poisoned(batch, torch.float64, self.device))

    def step(self, inputs: StepInputs, offset: int = 0) -> StepOutputs:
        workspace, outputs = self.buffers(inputs, offset)
        status = self.try_step(inputs, workspace, outputs)
        assert status == 0, f"sde_step returned {status}"
        assert all(map(guards_intact, (workspace, *outputs))), "sde_step wrote outside its buffers"
        x_next, eps, deviation_sq = outputs
        return StepOutputs(x_next.view(inputs.v.shape), eps.view(inputs.v.shape), deviation_sq)

    def deviation_sq(self, inputs: TransitionInputs) -> torch.Tensor:
        batch, elements = inputs.v.shape
        size = self._lib.advflow_transition_deviation_sq_workspace_cuda(batch, elements)
        workspace, out = (poisoned(n, torch.float64, self.device) for n in (size // 8, batch))
        pointers = workspace.data_ptr(), out.data_ptr()
        status = self._lib.advflow_transition_deviation_sq_cuda(
            ctypes.byref(_c_transition_inputs(inputs)), *pointers, self._stream()
        )
        assert status == 0, f"transition_deviation_sq returned {status}"
        assert guards_intact(workspace) and guards_intact(out), "transition_deviation_sq wrote outside its buffers"
        return out

    def eps(self, inputs: TransitionInputs, offset: int = 0) -> torch.Tensor:
        out = poisoned(inputs.v.numel(), inputs.dtype, self.device, offset)
        raw = _c_transition_inputs(inputs)
        status = self._lib.advflow_transition_deviation_cuda(ctypes.byref(raw), out.data_ptr(), self._stream())
        assert status == 0, f"transition_deviation returned {status}"
        assert guards_intact(out), "transition_deviation wrote outside its output"
        return out.view(inputs.v.shape)


class SummaryKernels(Kernels):
    def __init__(self, library: Path, device: str) -> None:
        super().__init__(library, device)
        self._declare("advflow_loss_summary_cuda", _CSummaryInputs, pointers=4)

    def try_summary(
        self, inputs: dict[str, Any], stat_means: int, largest: bool, reduction: str, outputs: list[torch.Tensor]
    ) -> int:
        batch = len(inputs["valid"])
        raw = _CSummaryInputs(
            _c_columns(inputs["means"], 8),
            _c_columns(inputs["required"], 4),
            *(_c_column(inputs[name]) for name in ("advantages", "extreme")),
            *(inputs[name].data_ptr() for name in ("stats", "coef", "valid", "flagged")),
            len(inputs["required"]),
            _DTYPE_CODES[inputs["stats"].dtype],
            report=_c_report(batch, reduction, mean_count=len(inputs["means"]), stat_count=stat_means, largest=largest),
        )
        pointers = [tensor.data_ptr() for tensor in outputs]
        return int(self._lib.advflow_loss_summary_cuda(ctypes.byref(raw), *pointers, self._stream()))

    def summary(self, inputs: dict[str, Any], stat_means: int, largest: bool, reduction: str) -> list[torch.Tensor]:
        """``inputs`` as :func:`advflow_ext.kernels.loss_summary.loss_summary` takes them, stats and coef contiguous."""
        batch = len(inputs["valid"])
        sizes = (batch if reduction == "none" else 1, batch * 3, len(inputs["means"]) + stat_means + 6)
        outputs = [poisoned(size, torch.float32, self.device) for size in sizes]
        status = self.try_summary(inputs, stat_means, largest, reduction, outputs)
        assert status == 0, f"loss_summary returned {status}"
        assert all(map(guards_intact, outputs)), "loss_summary wrote outside its outputs"
        loss, coef, metrics = outputs
        return [loss if reduction == "none" else loss[0], coef.view(batch, 3), metrics]


@dataclass(frozen=True)
class LossCall:
    """What a public loss hands to the core beside its latents."""

    loss: int  # its place among the names
    advantages: torch.Tensor
    t: torch.Tensor | None  # of the forward process
    index: torch.Tensor | None  # of the reverse process, beside steps
    steps: torch.Tensor | None
    numbers: list[float | torch.Tensor]
    choices: list[int]
    reduction: str
    metrics: int  # how many


class LossKernels(Kernels):
    def __init__(self, library: Path, device: str) -> None:
        super().__init__(library, device)
        self._declare("advflow_loss_cuda", _CLossInputs, pointers=6)

    def loss(self, call: LossCall, partials: torch.Tensor, elements: int) -> list[torch.Tensor]:
        """The loss, coefficients and metrics."""
        batch = len(call.advantages)
        raw = _CLossInputs(
            _c_number(call.advantages),
            _c_number(0.0 if call.t is None else call.t),
            *(None if tensor is None else tensor.data_ptr() for tensor in (call.index, call.steps)),
            0 if call.steps is None else len(call.steps),
            (_CNumber * 4)(*map(_c_number, call.numbers)),
            (ctypes.c_int32 * 3)(*call.choices),
            elements,
            call.loss,
            _DTYPE_CODES[torch.float32],
            _c_report(batch, call.reduction),
        )
        sizes = (batch * STATS, batch if call.reduction == "none" else 1, batch * 3, call.metrics)
        outputs = [poisoned(size, torch.float32, self.device) for size in sizes]
        pointers = [tensor.data_ptr() for tensor in (partials, *outputs)]
        status = self._lib.advflow_loss_cuda(ctypes.byref(raw), *pointers, self._stream())
        assert status == 0, f"loss returned {status}"
        assert all(map(guards_intact, (partials, *outputs))), "loss wrote outside its outputs"
        _, loss, coef, metrics = outputs
        return [loss if call.reduction == "none" else loss[0], coef.view(batch, 3), metrics]
