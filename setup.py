"""Builds advflow_ext._C. The only build logic there is; every switch is an environment variable.

    torch importable?
    |-- no ---------------------------------------------> error naming --no-build-isolation
    `-- yes: C++ compiler (CXX, else c++)?
        |-- no -----------------------------------------> error
        `-- yes: ADVFLOW_CUDA
            |-- 0 --------------------------------------> CPU kernels
            |-- auto (default): nvcc found?
            |   |-- no ---------------------------------> CPU kernels, said aloud
            |   `-- yes --------------------------------> CPU and CUDA kernels
            |-- 1: nvcc found?
            |   |-- no ---------------------------------> error
            |   `-- yes --------------------------------> CPU and CUDA kernels
            `-- anything else --------------------------> error

    nvcc is CUDA_HOME/bin/nvcc if CUDA_HOME is set, else the one on PATH. A visible GPU decides nothing, so that a
    machine without one builds the same module.
    ADVFLOW_SANITIZE=1 puts the C++ code under AddressSanitizer and UndefinedBehaviorSanitizer (make sanitize).
    TORCH_CUDA_ARCH_LIST (such as "8.0;9.0+PTX") replaces the default architectures. MAX_JOBS limits parallel compiles.

The .cu files see no torch header and are compiled by nvcc directly, because torch's CUDAExtension refuses to work with
a CPU-only torch; their objects and a static CUDA runtime are linked into an ordinary C++ extension.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
# Ampere and Hopper, and code the driver can compile for what comes after.
DEFAULT_ARCHITECTURES = "8.0;9.0+PTX"
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
NVCC_FLAGS = ["-std=c++17", "-O3", "--compiler-options", "-fPIC,-fvisibility=hidden"]


class BuildError(SystemExit):
    """Ends the build with one sentence instead of a traceback."""

    def __init__(self, sentence: str) -> None:
        super().__init__(f"advflow-ext: {sentence}")


def find_nvcc(environment: Mapping[str, str]) -> str | None:
    if home := environment.get("CUDA_HOME"):
        nvcc = Path(home) / "bin" / "nvcc"
        return str(nvcc) if nvcc.exists() else None
    return shutil.which("nvcc", path=environment.get("PATH", ""))


def choose_nvcc(environment: Mapping[str, str]) -> str | None:
    """The nvcc to build CUDA kernels with, or None for a CPU build."""
    wanted = environment.get("ADVFLOW_CUDA", "auto")
    if wanted not in ("auto", "1", "0"):
        raise BuildError(f"ADVFLOW_CUDA is {wanted!r}; accepted are auto, 1 and 0.")
    if wanted == "0":
        return None
    nvcc = find_nvcc(environment)
    if nvcc is None and wanted == "1":
        raise BuildError("ADVFLOW_CUDA=1 but there is no nvcc in CUDA_HOME/bin or on PATH; install the CUDA toolkit.")
    if nvcc is None:
        print("advflow-ext: no nvcc found, so only CPU kernels are built (ADVFLOW_CUDA=1 makes this an error).")
    return nvcc


def architecture_flags(environment: Mapping[str, str]) -> list[str]:
    flags = []
    for name in re.split(r"[;,\s]+", (environment.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHITECTURES).strip()):
        match = re.fullmatch(r"(\d+)\.(\d+[af]?)(\+PTX)?", name)
        if match is None:
            raise BuildError(
                f"TORCH_CUDA_ARCH_LIST has {name!r}; accepted are versions such as 8.0 or 9.0+PTX, split by semicolons."
            )
        number = match[1] + match[2]
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if match[3]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def choose_compiler(environment: Mapping[str, str]) -> str:
    compiler = environment.get("CXX") or "c++"
    if shutil.which(compiler.split()[0], path=environment.get("PATH", "")) is None:
        raise BuildError(f"there is no C++ compiler ({compiler} is not on PATH); install g++ or set CXX.")
    return compiler


def sanitizer_flags(environment: Mapping[str, str]) -> list[str]:
    wanted = environment.get("ADVFLOW_SANITIZE", "0")
    if wanted not in ("1", "0"):
        raise BuildError(f"ADVFLOW_SANITIZE is {wanted!r}; accepted are 1 and 0.")
    return SANITIZER_FLAGS if wanted == "1" else []


def first_line(*command: str) -> str:
    try:
        result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return result.stdout.strip().partition("\n")[0]


def nvcc_version(nvcc: str) -> str:
    output = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"V([\d.]+)", output)
    return match[1] if match else output.strip()


def static_runtime_flags(nvcc: str) -> list[str]:
    # nvcc may be a wrapper or a link, so it is asked where its libraries are.
    plan = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True)
    libraries = re.search(r"LIBRARIES=(.*)", plan.stdout + plan.stderr)
    folders = re.findall(r'"?-L([^"\s]+)"?', libraries[1]) if libraries else []
    return [f"-L{folder}" for folder in folders] + ["-lcudart_static", "-ldl", "-lpthread", "-lrt"]


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


def main() -> None:
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        raise BuildError(
            f"torch cannot be imported here ({error}); install it first, then use "
            "'pip install --no-build-isolation .' so that the build can see it."
        ) from None

    # torch gained a device-generic stream handle that needs no CUDA header; see csrc/torch/stream.cpp.
    stream_header = Path(torch.__file__).parent / "include" / "c10" / "core" / "Stream.h"
    generic_stream = "native_handle" in stream_header.read_text()

    class Build(BuildExtension):  # type: ignore[misc]
        def build_extensions(self) -> None:
            compiler = choose_compiler(os.environ)
            nvcc = choose_nvcc(os.environ)
            if nvcc and torch.version.cuda is None and not generic_stream:
                raise BuildError(
                    f"CUDA kernels beside a CPU-only torch need one newer than {torch.__version__}; set ADVFLOW_CUDA=0."
                )
            architectures = architecture_flags(os.environ) if nvcc else []
            (extension,) = self.extensions
            if generic_stream:
                extension.define_macros.append(("ADVFLOW_GENERIC_STREAM", None))
            if nvcc:
                extension.define_macros.append(("ADVFLOW_WITH_CUDA", None))
                flags = NVCC_FLAGS + architectures
                extension.extra_objects += compile_cuda(nvcc, flags, Path(self.build_temp).resolve() / "cuda")
                extension.extra_link_args += static_runtime_flags(nvcc)
                if not generic_stream:
                    extension.include_dirs.append(str(Path(nvcc).resolve().parent.parent / "include"))
                    extension.libraries.append("c10_cuda")

            record = json.dumps(
                {
                    "torch": torch.__version__,
                    "python": sys.version.split()[0],
                    "cuda": bool(nvcc),
                    "architectures": [flag.rpartition("=")[2] for flag in architectures],
                    "nvcc": nvcc_version(nvcc) if nvcc else "",
                    "nvcc_flags": NVCC_FLAGS if nvcc else [],
                    "compiler": first_line(*compiler.split(), "--version"),
                    "compiler_flags": CXX_FLAGS + sanitizers,
                    "commit": first_line("git", "rev-parse", "HEAD"),
                }
            )
            generated = Path(self.build_temp).resolve() / "generated"
            generated.mkdir(parents=True, exist_ok=True)
            header = f'#pragma once\n#define ADVFLOW_BUILD_INFO R"json({record})json"\n'
            (generated / "advflow_build_info.h").write_text(header)
            extension.include_dirs.append(str(generated))
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
    sanitizers = sanitizer_flags(os.environ)
    extension = CppExtension(
        "advflow_ext._C",
        sources,
        depends=headers,
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args={"cxx": CXX_FLAGS + sanitizers},
        define_macros=[],
        extra_link_args=list(sanitizers),
    )
    setup(ext_modules=[extension], cmdclass={"build_ext": Build})


if __name__ == "__main__":
    main()
