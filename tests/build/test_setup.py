"""What setup.py decides, and that every refusal is one sentence. Nothing is compiled here."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def setup():
    spec = importlib.util.spec_from_file_location("advflow_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def executable(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def test_auto_builds_cuda_exactly_when_nvcc_is_found(setup, tmp_path, capsys):
    nvcc = executable(tmp_path / "bin" / "nvcc")
    for wanted in ({}, {"ADVFLOW_CUDA": "auto"}, {"ADVFLOW_CUDA": "1"}):
        assert setup.choose_nvcc({"PATH": str(nvcc.parent), **wanted}) == str(nvcc)
        assert setup.choose_nvcc({"PATH": "", "CUDA_HOME": str(tmp_path), **wanted}) == str(nvcc)
    assert setup.choose_nvcc({"PATH": str(nvcc.parent), "ADVFLOW_CUDA": "0"}) is None
    assert capsys.readouterr().out == ""
    assert setup.choose_nvcc({"PATH": str(tmp_path)}) is None
    assert "only CPU kernels are built" in capsys.readouterr().out


def test_refusals_are_sentences(setup, tmp_path):
    with pytest.raises(SystemExit, match=r"ADVFLOW_CUDA=1 but there is no nvcc in CUDA_HOME/bin or on PATH"):
        setup.choose_nvcc({"ADVFLOW_CUDA": "1", "PATH": str(tmp_path)})
    with pytest.raises(SystemExit, match=r"ADVFLOW_CUDA is 'yes'; accepted are auto, 1 and 0"):
        setup.choose_nvcc({"ADVFLOW_CUDA": "yes"})
    with pytest.raises(SystemExit, match=r"ADVFLOW_SANITIZE is 'yes'; accepted are 1 and 0"):
        setup.sanitizer_flags({"ADVFLOW_SANITIZE": "yes"})
    with pytest.raises(SystemExit, match=r"there is no C\+\+ compiler \(c\+\+ is not on PATH\)"):
        setup.choose_compiler({"PATH": str(tmp_path)})
    with pytest.raises(SystemExit, match=r"TORCH_CUDA_ARCH_LIST has 'Hopper'; accepted are versions such as"):
        setup.architecture_flags({"TORCH_CUDA_ARCH_LIST": "8.0;Hopper"})


def test_architectures(setup):
    default = setup.architecture_flags({})
    assert default == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=compute_90",
    ]
    assert setup.architecture_flags({"TORCH_CUDA_ARCH_LIST": ""}) == default
    assert setup.architecture_flags({"TORCH_CUDA_ARCH_LIST": "9.0a, 10.0+PTX"}) == [
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_100,code=sm_100",
        "-gencode=arch=compute_100,code=compute_100",
    ]


def test_no_fast_math(setup):
    assert not any("fast" in flag for flag in setup.CXX_FLAGS + setup.NVCC_FLAGS)


def run_setup(arguments: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=ROOT,
        env={**{k: v for k, v in os.environ.items() if k not in ("CUDA_HOME", "CXX")}, **environment},
        capture_output=True,
        text=True,
    )


def build_into(folder: Path) -> list[str]:
    return ["-q", "build_ext", "--build-temp", str(folder / "temp"), "--build-lib", str(folder / "lib")]


def test_a_build_without_nvcc_ends_in_one_sentence(tmp_path):
    executable(tmp_path / "bin" / "c++")
    result = run_setup(build_into(tmp_path), ADVFLOW_CUDA="1", PATH=str(tmp_path / "bin"))
    assert result.returncode != 0 and "Traceback" not in result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith("advflow-ext: ADVFLOW_CUDA=1 but there is no nvcc")


def test_a_build_without_compiler_ends_in_one_sentence(tmp_path):
    result = run_setup(build_into(tmp_path), PATH=str(tmp_path))
    assert result.returncode != 0 and "Traceback" not in result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith("advflow-ext: there is no C++ compiler")


def test_a_build_without_torch_ends_in_one_sentence(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('No module named torch')\n")
    result = run_setup(["--version"], PYTHONPATH=str(tmp_path))
    assert result.returncode != 0 and "Traceback" not in result.stderr
    assert "torch cannot be imported here" in result.stderr and "--no-build-isolation" in result.stderr


def test_the_source_archive_holds_what_a_build_needs(tmp_path):
    # From a copy: the archive's by-products must not land in the tree.
    tree = tmp_path / "tree"
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".*", "build", "runs", "*.egg-info", "*.so", "python"))
    result = subprocess.run(
        [sys.executable, "setup.py", "-q", "sdist", "-d", str(tmp_path)], cwd=tree, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as content:
        names = {name.partition("/")[2] for name in content.getnames()}
    needed = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    needed |= {"setup.py", "pyproject.toml", "LICENSE", "advflow_ext/__init__.py", "advflow_ext/py.typed"}
    assert needed <= names
    assert not any(name.endswith((".so", "_build.json")) for name in names)
