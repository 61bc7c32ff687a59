"""Builds advflow_ext._C. The only build logic there is; every switch is an environment variable.

    torch importable, or in this interpreter's site-packages (which pip's isolated build hides)?
    |-- no ---------------------------------------------> error naming --no-build-isolation
    `-- yes: at least MINIMUM_TORCH?
        |-- no -----------------------------------------> error
        `-- yes: C++ compiler (CXX, else c++)?
            |-- no -------------------------------------> error
            `-- yes: ADVFLOW_CUDA
                |-- 0 ----------------------------------> CPU kernels
                |-- auto (default): nvcc found?
                |   |-- no -----------------------------> CPU kernels, said aloud
                |   `-- yes: of torch's CUDA major?
                |       |-- no -------------------------> error
                |       `-- yes, or torch has no CUDA --> CPU and CUDA kernels
                |-- 1: as auto, but no nvcc ------------> error
                `-- anything else ----------------------> error

    All of it is decided before anything is compiled. nvcc is CUDA_HOME/bin/nvcc, else CUDA_PATH/bin/nvcc, else the one
    on PATH, else /usr/local/cuda/bin/nvcc. A visible GPU decides nothing, so that a machine without one builds the same
    module. TORCH_CUDA_ARCH_LIST (such as "8.0;9.0+PTX" or "Ampere Hopper", as torch reads it) replaces the default
    architectures. MAX_JOBS limits parallel compiles. ADVFLOW_SANITIZE=1 puts the C++ code under AddressSanitizer and
    UndefinedBehaviorSanitizer (make sanitize). ADVFLOW_STRICT=1 makes warnings errors (make test, but no user's build,
    whose compiler may know new ones).

The .cu files see no torch header and are compiled by nvcc directly, because torch's CUDAExtension refuses to work with
a CPU-only torch; their objects and a static CUDA runtime are linked into an ordinary C++ extension.

A module serves one release of torch, so what is installed says which, and with whose CUDA, in its version's local
label: 0.1.0+torch2.13.0.cu130, or .cpu. A source archive has none, and needs no torch to be made.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from setuptools import setup
from setuptools.command.egg_info import egg_info

ROOT = Path(__file__).resolve().parent
MINIMUM_TORCH = (2, 11)
USUAL_TOOLKIT = "/usr/local/cuda"
# Ampere and Hopper, and code the driver can compile for what comes after.
DEFAULT_ARCHITECTURES = "8.0;9.0+PTX"
# torch's own names for them.
NAMED_ARCHITECTURES = {
    "Maxwell": "5.0;5.2+PTX",
    "Maxwell+Tegra": "5.3",
    "Pascal": "6.0;6.1+PTX",
    "Volta": "7.0+PTX",
    "Volta+Tegra": "7.2",
    "Turing": "7.5+PTX",
    "Ampere": "8.0;8.6+PTX",
    "Ampere+Tegra": "8.7",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell": "10.0;10.3;12.0;12.1+PTX",
    "Blackwell+Tegra": "11.0",
}
# Without contraction every vector unit rounds alike, so a wheel gives the same numbers on every x86 machine. Nobody
# reads floating-point traps, and honouring them keeps conversions from vectorizing; no value changes.
# The C++ standard is left to torch, whose headers set the lower bound. Compiled for OpenMP, which at::parallel_for
# needs, but not linked with it: the symbols then come from the runtime torch loaded, and both share its threads.
CXX_FLAGS = ["-O3", "-g0", "-fopenmp", "-fvisibility=hidden", "-ffp-contract=off", "-fno-trapping-math", "-Wno-psabi"]
# After CXX_FLAGS, whose optimisation they replace. vptr would need the type information that torch hides.
SANITIZER_FLAGS = [
    "-O1",
    "-g",
    "-fno-omit-frame-pointer",
    "-fsanitize=address,undefined",
    "-fno-sanitize=vptr",
    "-fno-sanitize-recover=all",
]
STRICT_FLAGS = ["-Wall", "-Wextra", "-Werror"]
# The host's compiler sees pragmas that are nvcc's own.
STRICT_NVCC_FLAGS = ["--compiler-options", "-Wall,-Wextra,-Wno-unknown-pragmas", "-Werror", "all-warnings"]
NVCC_FLAGS = ["-std=c++17", "-O3", "--compiler-options", "-fPIC,-fvisibility=hidden"]


class BuildError(SystemExit):
    """Ends the build with one sentence instead of a traceback."""

    def __init__(self, sentence: str) -> None:
        super().__init__(f"advflow-ext: {sentence}")


def is_program(path: Path) -> bool:
    return path.is_file() and os.access(path, os.X_OK)


def find_nvcc(environment: Mapping[str, str]) -> tuple[str | None, list[str]]:
    """The first nvcc there is, and the places before it that have none."""
    without: list[str] = []
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        home = environment.get(variable)
        if home and is_program(nvcc := Path(home) / "bin" / "nvcc"):
            return str(nvcc), without
        without.append(f"{variable} ({home or 'not set'})")
    if on_path := shutil.which("nvcc", path=environment.get("PATH", "")):
        return on_path, without
    if is_program(nvcc := Path(USUAL_TOOLKIT) / "bin" / "nvcc"):
        return str(nvcc), without
    return None, without


def choose_nvcc(environment: Mapping[str, str]) -> str | None:
    """The nvcc to build CUDA kernels with, or None for a CPU build."""
    wanted = environment.get("ADVFLOW_CUDA", "auto")
    if wanted not in ("auto", "1", "0"):
        raise BuildError(f"ADVFLOW_CUDA is {wanted!r}; accepted are auto, 1 and 0.")
    if wanted == "0":
        return None
    nvcc, without = find_nvcc(environment)
    if nvcc is None and wanted == "1":
        raise BuildError(
            f"ADVFLOW_CUDA=1 but there is no nvcc in the bin folders of {', '.join(without)} and {USUAL_TOOLKIT} "
            "or on PATH; install the CUDA toolkit or set CUDA_HOME to it."
        )
    if nvcc is None:
        print("advflow-ext: no nvcc found, so only CPU kernels are built (ADVFLOW_CUDA=1 makes this an error).")
    elif named := [place for place in without if not place.endswith("(not set)")]:
        print(f"advflow-ext: there is no bin/nvcc in {' nor in '.join(named)}; {nvcc} is used.")
    return nvcc


def cuda_version(nvcc: str) -> str:
    """What nvcc says it is of, such as "13.0.88"."""
    try:
        output = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(
            f"{nvcc} cannot be run ({error}); set CUDA_HOME to a toolkit that works, or ADVFLOW_CUDA=0."
        ) from None
    match = re.search(r"\bV(\d+\.[\d.]+)", output)
    if match is None:
        raise BuildError(f"{nvcc} --version names no CUDA version; set CUDA_HOME to a CUDA toolkit, or ADVFLOW_CUDA=0.")
    return match[1]


def require_one_cuda(nvcc: str, version: str, torch: str, torch_cuda: str | None) -> None:
    """Kernels of one major version of CUDA beside a torch of another would share a process with two runtimes."""
    if torch_cuda is None or torch_cuda.split(".")[0] == version.split(".")[0]:
        return
    raise BuildError(
        f"{nvcc} is of CUDA {version} but torch {torch} is built for CUDA {torch_cuda}; set CUDA_HOME to a toolkit of "
        f"CUDA {torch_cuda.split('.')[0]}, or ADVFLOW_CUDA=0 for CPU kernels alone."
    )


def require_torch_release(version: str) -> None:
    match = re.match(r"(\d+)\.(\d+)", version)
    if match is None or (int(match[1]), int(match[2])) < MINIMUM_TORCH:
        oldest = ".".join(map(str, MINIMUM_TORCH))
        raise BuildError(f"torch is {version}; accepted is {oldest} or newer: 'pip install \"torch>={oldest}\"' first.")


def architecture_flags(environment: Mapping[str, str]) -> list[str]:
    """nvcc's flags for TORCH_CUDA_ARCH_LIST, in the order given. Commas are taken for the semicolons they stand for."""
    wanted = environment.get("TORCH_CUDA_ARCH_LIST", "")
    names = [name for name in re.split(r"[;,\s]+", wanted) if name] or DEFAULT_ARCHITECTURES.split(";")
    flags: dict[str, None] = {}
    for name in ";".join(NAMED_ARCHITECTURES.get(name, name) for name in names).split(";"):
        match = re.fullmatch(r"(\d+)\.(\d+[af]?)(\+PTX)?", name)
        if match is None:
            raise BuildError(
                f"TORCH_CUDA_ARCH_LIST has {name!r}; accepted are versions such as 8.0 or 9.0+PTX and the names "
                f"{', '.join(NAMED_ARCHITECTURES)}, split by semicolons."
            )
        number = match[1] + match[2]
        flags[f"-gencode=arch=compute_{number},code=sm_{number}"] = None
        if match[3]:
            flags[f"-gencode=arch=compute_{number},code=compute_{number}"] = None
    return list(flags)


def require_known_architectures(nvcc: str, version: str, flags: list[str]) -> None:
    known = set(subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout.split())
    for flag in flags:
        architecture = re.search(r"arch=(compute_\d+)", flag)[1]  # type: ignore[index]
        if known and architecture not in known:
            raise BuildError(
                f"TORCH_CUDA_ARCH_LIST asks for {architecture}, which {nvcc} of CUDA {version} cannot compile for; it "
                f"knows {', '.join(sorted(known))}."
            )


def choose_compiler(environment: Mapping[str, str]) -> str:
    compiler = environment.get("CXX") or "c++"
    if shutil.which(compiler.split()[0], path=environment.get("PATH", "")) is None:
        raise BuildError(f"there is no C++ compiler ({compiler} is not on PATH); install g++ or set CXX.")
    return compiler


def is_on(environment: Mapping[str, str], switch: str) -> bool:
    wanted = environment.get(switch, "0")
    if wanted not in ("1", "0"):
        raise BuildError(f"{switch} is {wanted!r}; accepted are 1 and 0.")
    return wanted == "1"


def strict_flags(others: list[str]) -> list[str]:
    """For our code alone: headers in the folders of ``others`` may warn."""
    return STRICT_FLAGS + [f"-isystem{folder}" for folder in others]


def first_line(*command: str) -> str:
    try:
        result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return result.stdout.strip().partition("\n")[0]


def static_runtime_flags(nvcc: str) -> list[str]:
    # nvcc may be a wrapper or a link, so it is asked where its libraries are.
    plan = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True)
    libraries = re.search(r"LIBRARIES=(.*)", plan.stdout + plan.stderr)
    folders = re.findall(r'"?-L([^"\s]+)"?', libraries[1]) if libraries else []
    return [f"-L{folder}" for folder in folders] + ["-lcudart_static", "-ldl", "-lpthread", "-lrt"]


def shared_runtime_flags(compiler: list[str]) -> list[str]:
    """torch's own libstdc++, for a compiler that has it as an archive alone.

    A second one, linked into the module, shares some of the first one's objects: a number in an error's sentence may
    then be handed to a part of the library that writes something else, which ends the process.
    """

    def has(library: str) -> bool:
        return Path(first_line(*compiler, f"-print-file-name={library}")).is_absolute()

    maps = Path("/proc/self/maps")
    if has("libstdc++.so") or not has("libstdc++.a") or not maps.exists():
        return []
    # Address, rights, offset, device, inode, and the path, which may hold spaces.
    mapped = (line.split(maxsplit=5)[-1] for line in maps.read_text(errors="surrogateescape").splitlines())
    return [
        path for path in dict.fromkeys(mapped) if Path(path).name.startswith("libstdc++.so.6") and Path(path).is_file()
    ][:1]


def compile_cuda(nvcc: str, flags: list[str], folder: Path) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)

    def compile_one(source: Path) -> str:
        target = folder / f"{source.stem}.cuda.o"
        command = [nvcc, *flags, "-I", str(ROOT / "csrc"), "-c", str(source), "-o", str(target)]
        print(" ".join(command), flush=True)
        if subprocess.run(command).returncode:
            raise BuildError(f"nvcc could not compile {source.relative_to(ROOT)}; its messages are above.")
        return str(target)

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        return list(pool.map(compile_one, sorted((ROOT / "csrc" / "cuda").glob("*.cu"))))


def import_torch() -> ModuleType:
    try:
        import torch
    except ImportError:
        # pip's isolated build hides the environment that the module is for, but runs the interpreter of it.
        for folder in site.getsitepackages():
            site.addsitedir(folder)
    try:
        import torch
    except ImportError as error:
        raise BuildError(
            f"torch cannot be imported here ({error}); install it first, then repeat the command with "
            "--no-build-isolation, as in 'pip install --no-build-isolation .', so that the build can see it."
        ) from None
    return torch


@dataclass(frozen=True)
class Plan:
    """What is built, with what."""

    compiler: str
    nvcc: str | None
    cuda: str  # nvcc's version; empty for CPU kernels alone
    architectures: list[str]
    torch: str
    # torch gained a device-generic stream handle that needs no CUDA header; see csrc/torch/stream.cpp.
    generic_stream: bool

    @property
    def label(self) -> str:
        """The local version label of what is installed: which torch it serves, and with whose CUDA."""
        cuda = f"cu{''.join(self.cuda.split('.')[:2])}" if self.cuda else "cpu"
        return f"+torch{self.release}.{cuda}"

    @property
    def release(self) -> str:
        return self.torch.split("+")[0]


def make_plan(environment: Mapping[str, str], torch: ModuleType) -> Plan:
    require_torch_release(torch.__version__)
    compiler = choose_compiler(environment)
    nvcc = choose_nvcc(environment)
    stream_header = Path(torch.__file__ or "").parent / "include" / "c10" / "core" / "Stream.h"
    generic_stream = "native_handle" in stream_header.read_text()
    if nvcc is None:
        return Plan(compiler, None, "", [], torch.__version__, generic_stream)
    if torch.version.cuda is None and not generic_stream:
        raise BuildError(
            f"CUDA kernels beside a CPU-only torch need one newer than {torch.__version__}; set ADVFLOW_CUDA=0."
        )
    cuda = cuda_version(nvcc)
    require_one_cuda(nvcc, cuda, torch.__version__, torch.version.cuda)
    architectures = architecture_flags(environment)
    require_known_architectures(nvcc, cuda, architectures)
    return Plan(compiler, nvcc, cuda, architectures, torch.__version__, generic_stream)


def sources_digest() -> str:
    """What csrc/ held when it was compiled; advflow_ext/_native.py computes the same of a source tree."""
    digest = hashlib.sha256()
    for path in sorted(path for path in (ROOT / "csrc").rglob("*.*") if path.suffix in (".h", ".cuh", ".cu", ".cpp")):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def write_if_changed(path: Path, text: str) -> None:
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def main() -> None:
    if {"sdist", "egg_info"} & set(sys.argv):  # neither compiles, and a source archive is for every torch
        setup()
        return
    plan = make_plan(os.environ, import_torch())
    sanitizers = SANITIZER_FLAGS if is_on(os.environ, "ADVFLOW_SANITIZE") else []
    from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths

    cxx_flags, nvcc_flags = CXX_FLAGS + sanitizers, NVCC_FLAGS
    if is_on(os.environ, "ADVFLOW_STRICT"):
        cxx_flags += strict_flags([*include_paths(), sysconfig.get_path("include")])
        nvcc_flags = NVCC_FLAGS + STRICT_NVCC_FLAGS

    class Labelled(egg_info):  # type: ignore[misc]
        def finalize_options(self) -> None:
            self.tag_build = plan.label
            # So that pip takes the right one of several wheels, and says so when torch is replaced under one.
            for holder in (self.distribution, self.distribution.metadata):
                holder.install_requires = [f"torch=={plan.release}"]
            super().finalize_options()

    class Build(BuildExtension):
        def build_extensions(self) -> None:
            (extension,) = self.extensions
            extension.extra_link_args += shared_runtime_flags(self.compiler.compiler_cxx)
            if plan.generic_stream:
                extension.define_macros.append(("ADVFLOW_GENERIC_STREAM", None))
            if plan.nvcc:
                extension.define_macros.append(("ADVFLOW_WITH_CUDA", None))
                flags = nvcc_flags + plan.architectures
                extension.extra_objects += compile_cuda(plan.nvcc, flags, Path(self.build_temp).resolve() / "cuda")
                extension.extra_link_args += static_runtime_flags(plan.nvcc)
                if not plan.generic_stream:
                    extension.include_dirs.append(str(Path(plan.nvcc).resolve().parent.parent / "include"))
                    extension.libraries.append("c10_cuda")

            record = json.dumps(
                {
                    "torch": plan.torch,
                    "python": sys.version.split()[0],
                    "cuda": bool(plan.nvcc),
                    "architectures": [flag.rpartition("=")[2] for flag in plan.architectures],
                    "nvcc": plan.cuda,
                    "nvcc_flags": nvcc_flags if plan.nvcc else [],
                    "compiler": first_line(*plan.compiler.split(), "--version"),
                    # Where the headers lie on this machine says nothing about the module.
                    "compiler_flags": [flag for flag in cxx_flags if not flag.startswith("-isystem")],
                    "commit": first_line("git", "rev-parse", "HEAD"),
                    "label": plan.label,
                    "sources": sources_digest(),
                }
            )
            header = Path(self.build_temp).resolve() / "generated" / "advflow_build_info.h"
            write_if_changed(header, f'#pragma once\n#define ADVFLOW_BUILD_INFO R"json({record})json"\n')
            extension.include_dirs.append(str(header.parent))
            # Or a tree that was built for one torch would give its module, as up to date, to another.
            extension.depends.append(str(header))
            super().build_extensions()
            # Beside the module, because it is read before a module built for another torch could crash on loading.
            self.record = Path(self.get_ext_fullpath(extension.name)).with_name("_build.json")
            self.record.write_text(record + "\n")

        def copy_extensions_to_source(self) -> None:  # an editable or in-place build
            super().copy_extensions_to_source()
            shutil.copy(self.record, ROOT / "advflow_ext")

    sources = sorted(
        str(path.relative_to(ROOT)) for folder in ("cpu", "torch") for path in (ROOT / "csrc" / folder).glob("*.cpp")
    )
    headers = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.h"))
    extension = CppExtension(
        "advflow_ext._C",
        sources,
        depends=headers,
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args={"cxx": cxx_flags},
        define_macros=[],
        extra_link_args=list(sanitizers),
    )
    setup(ext_modules=[extension], cmdclass={"build_ext": Build, "egg_info": Labelled})


if __name__ == "__main__":
    main()
