"""Finds the compiled module, and says in one sentence what is missing when it cannot serve."""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
import warnings
from collections.abc import Iterator
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

PACKAGE = Path(__file__).resolve().parent
BUILD_RECORD = PACKAGE / "_build.json"  # written by setup.py beside the compiled module

# The numbers and columns that Python and C++ must agree on, checked when the module is loaded.
INTERFACE = 5
DTYPES = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 3}
# Columns of residual_stats, each a mean over one sample's elements.
STATS = ("vu_sq", "vo_sq", "vp_sq", "ou_sq", "vu_abs", "ou_abs", "plus_abs", "minus_abs")


_MODULE = "advflow_ext._C"
_REINSTALL = "'pip install --no-build-isolation .' (until then the slower PyTorch reference serves)."


def _release(version: str) -> str:
    # "2.13.0+cpu" and "2.13.0+cu130" share one C++ interface.
    return version.split("+")[0]


def _load() -> tuple[ModuleType | None, str]:
    """The module and "", or None and the sentence that explains why; says aloud where it is not this package's own."""
    tree = PACKAGE.parent
    if not (tree / "csrc").is_dir() or not _unfit(BUILD_RECORD):
        return _load_from(PACKAGE, BUILD_RECORD)
    # A source tree without a module of just these sources, perhaps in front of what was installed from it.
    copies = [(copy, _unfit(copy / "_build.json")) for copy in _built_copies()]
    here = f"advflow_ext is imported from the source tree {tree}; the built copy is at"
    for copy, unfit in copies:
        if not unfit:
            module, problem = _load_from(copy, copy / "_build.json")
            if module is not None:
                warnings.warn(f"{here} {copy}, whose compiled module is used.", RuntimeWarning, stacklevel=4)
            return module, problem
    if copies and not _has_module(PACKAGE):
        copy, unfit = copies[0]
        return None, f"{here} {copy} and {unfit}; reinstall it with {_REINSTALL}"
    return _load_from(PACKAGE, BUILD_RECORD)


def _unfit(record: Path) -> str:
    """Why a module with this record does not belong to this source tree and this torch; "" where it does."""
    built = json.loads(record.read_text()) if record.exists() else {}
    if built.get("sources") != _sources_digest():
        return "was built from other sources"
    return _for_another_torch(built["torch"])


def _for_another_torch(built_for: str) -> str:
    same = _release(built_for) == _release(torch.__version__)
    return "" if same else f"was built for torch {built_for} but torch {torch.__version__} is installed"


def _load_from(folder: Path, record: Path) -> tuple[ModuleType | None, str]:
    # Read before importing: a module built for another torch may crash the interpreter instead of raising.
    if record.exists() and (unfit := _for_another_torch(json.loads(record.read_text())["torch"])):
        return None, f"advflow_ext {unfit}; reinstall it with {_REINSTALL}"
    try:
        module = _import_from(folder)
    except ImportError as error:
        return None, f"advflow_ext has no usable compiled module ({error}); build it with {_REINSTALL}"
    found = tuple(getattr(module, name, None) for name in ("INTERFACE", "DTYPES", "STATS"))
    if found != (INTERFACE, DTYPES, STATS):
        return None, (
            f"advflow_ext's compiled module belongs to another version of the package; reinstall it with {_REINSTALL}"
        )
    return module, ""


def _import_from(folder: Path) -> ModuleType:
    spec = None if _MODULE in sys.modules else PathFinder.find_spec(_MODULE, [str(folder)])
    if spec is None or spec.loader is None:
        return importlib.import_module(_MODULE)
    module = sys.modules[_MODULE] = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[_MODULE]
        raise
    return module


def _built_copies() -> Iterator[Path]:
    """Other folders that `import advflow_ext` would find, were this one not in front, and that hold a module."""
    entries = [Path(entry or ".").resolve() / "advflow_ext" for entry in sys.path]
    finders = [finder for finder in sys.meta_path if finder is not PathFinder]  # editable installs have their own
    specs = [finder.find_spec("advflow_ext", None) for finder in finders]
    entries += [Path(spec.origin).resolve().parent for spec in specs if spec is not None and spec.origin]
    for folder in dict.fromkeys(entries):
        if folder != PACKAGE and _has_module(folder):
            yield folder


def _has_module(folder: Path) -> bool:
    return PathFinder.find_spec(_MODULE, [str(folder)]) is not None


def _sources_digest() -> str:
    """setup.py's digest of csrc/, of the source tree this package lies in."""
    root = PACKAGE.parent
    digest = hashlib.sha256()
    for path in sorted(path for path in (root / "csrc").rglob("*.*") if path.suffix in (".h", ".cuh", ".cu", ".cpp")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


module, problem = _load()
if problem:
    warnings.warn(problem, RuntimeWarning, stacklevel=3)


def build_info() -> dict[str, Any] | None:
    """The build record compiled into the module, or None where there is none."""
    return None if module is None else json.loads(module.build_info())


# The local version label setup.py gives what it builds: the torch it serves, and with whose CUDA.
LABEL: str = (build_info() or {}).get("label", "")
DEVICES: frozenset[str] = frozenset()
if module is not None:
    DEVICES = frozenset({"cpu", "cuda"} if module.WITH_CUDA else {"cpu"})

_devices_warned_of: set[str] = set()


def transformed(*tensors: object) -> bool:
    """Whether forward-mode differentiation or a torch.func transform is on, which the compiled ops take no part in."""
    if torch.compiler.is_compiling():
        return False
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    return forward_ad._current_level >= 0 or any(isinstance(tensor, Tensor) and wrapped(tensor) for tensor in tensors)


def serves(tensor: object, *others: object) -> bool:
    """Whether the compiled ops serve a call on these tensors; says once for each device when they have no kernels."""
    if module is None or transformed(tensor, *others):
        return False
    device = tensor.device.type if isinstance(tensor, Tensor) else "cpu"
    if device in DEVICES or device == "meta":
        return True
    _say_once_without(device)
    return False


def _say_once_without(device: str) -> None:
    if device in _devices_warned_of:
        return
    _devices_warned_of.add(device)
    remedy = "; reinstall it where nvcc is found (ADVFLOW_CUDA=1 insists on it)" if device == "cuda" else ""
    warnings.warn(
        f"advflow_ext was built without {device} kernels: "
        f"the slower PyTorch reference serves {device} tensors{remedy}.",
        RuntimeWarning,
        stacklevel=4,
    )


# torch.compiler.assume_constant_result, whose import would bring all of Dynamo: called for real while a call is traced,
# or who compiles the first call would never be told.
_say_once_without._dynamo_marked_constant = True  # type: ignore[attr-defined]
