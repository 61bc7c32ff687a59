"""What setup.py decides, and that every refusal is one sentence. Nothing is compiled here."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from setuptools import Distribution
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def setup(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("advflow_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "advflow_setup", module)  # where dataclasses look their module up
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "USUAL_TOOLKIT", str(tmp_path / "usual"))  # this machine's toolkit is not the question
    return module


def executable(path: Path, script: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}")
    path.chmod(0o755)
    return path


def fake_nvcc(toolkit: Path, version: str, architectures: str = "") -> Path:
    return executable(
        toolkit / "bin" / "nvcc",
        f"case $1 in --version) echo 'Cuda compilation tools, release {version[:4]}, V{version}';;\n"
        f"--list-gpu-arch) printf '%s\\n' {architectures};; *) touch {toolkit}/compiled; exit 1;; esac\n",
    )


def fake_torch(folder: Path, version: str, cuda: str | None = None, stream: str = "native_handle") -> Path:
    """A package that answers what setup.py asks before it compiles; asked for anything else, it is not there."""
    (folder / "torch" / "include" / "c10" / "core").mkdir(parents=True)
    (folder / "torch" / "include" / "c10" / "core" / "Stream.h").write_text(stream)
    (folder / "torch" / "__init__.py").write_text(
        f"from types import SimpleNamespace\n__version__ = {version!r}\nversion = SimpleNamespace(cuda={cuda!r})\n"
    )
    return folder


def test_auto_builds_cuda_exactly_when_nvcc_is_found(setup, tmp_path, capsys):
    nvcc = executable(tmp_path / "bin" / "nvcc")
    for wanted in ({}, {"ADVFLOW_CUDA": "auto"}, {"ADVFLOW_CUDA": "1"}):
        assert setup.choose_nvcc({"PATH": str(nvcc.parent), **wanted}) == str(nvcc)
        assert setup.choose_nvcc({"PATH": "", "CUDA_HOME": str(tmp_path), **wanted}) == str(nvcc)
    assert setup.choose_nvcc({"PATH": str(nvcc.parent), "ADVFLOW_CUDA": "0"}) is None
    assert capsys.readouterr().out == ""
    assert setup.choose_nvcc({"PATH": str(tmp_path)}) is None
    assert "only CPU kernels are built" in capsys.readouterr().out


def test_nvcc_is_looked_for_in_every_usual_place(setup, tmp_path, capsys):
    places = [fake_nvcc(tmp_path / name, "13.0.88") for name in ("home", "path-variable", "on-path", "usual")]
    folders = [str(nvcc.parent.parent) for nvcc in places]
    environment = {"CUDA_HOME": folders[0], "CUDA_PATH": folders[1], "PATH": str(places[2].parent)}
    for nvcc, folder in zip(places, folders, strict=True):
        assert setup.choose_nvcc(environment) == str(nvcc)
        shutil.rmtree(folder)  # a variable that is set but holds no nvcc hides none further on
    said = capsys.readouterr().out.splitlines()
    assert said[
        -1
    ] == f"advflow-ext: there is no bin/nvcc in CUDA_HOME ({folders[0]}) nor in CUDA_PATH ({folders[1]}); " + (
        f"{places[3]} is used."
    )
    assert setup.choose_nvcc(environment) is None


def test_what_is_no_program_is_no_nvcc(setup, tmp_path):
    (tmp_path / "bin" / "nvcc").mkdir(parents=True)
    assert setup.choose_nvcc({"CUDA_HOME": str(tmp_path), "PATH": str(tmp_path / "bin")}) is None
    (tmp_path / "bin" / "nvcc").rmdir()
    (tmp_path / "bin" / "nvcc").write_text("not executable")
    assert setup.choose_nvcc({"CUDA_HOME": str(tmp_path), "PATH": str(tmp_path / "bin")}) is None


def test_refusals_are_sentences(setup, tmp_path):
    with pytest.raises(
        SystemExit, match=r"ADVFLOW_CUDA=1 but there is no nvcc in the bin folders of CUDA_HOME"
    ) as said:
        setup.choose_nvcc({"ADVFLOW_CUDA": "1", "PATH": str(tmp_path), "CUDA_PATH": "/opt/none"})
    for tried in ("CUDA_HOME (not set)", "CUDA_PATH (/opt/none)", setup.USUAL_TOOLKIT, "on PATH"):
        assert tried in str(said.value)
    with pytest.raises(SystemExit, match=r"ADVFLOW_CUDA is 'yes'; accepted are auto, 1 and 0"):
        setup.choose_nvcc({"ADVFLOW_CUDA": "yes"})
    for switch in ("ADVFLOW_SANITIZE", "ADVFLOW_STRICT"):
        with pytest.raises(SystemExit, match=rf"{switch} is 'yes'; accepted are 1 and 0"):
            setup.is_on({switch: "yes"}, switch)
    with pytest.raises(SystemExit, match=r"there is no C\+\+ compiler \(c\+\+ is not on PATH\)"):
        setup.choose_compiler({"PATH": str(tmp_path)})
    with pytest.raises(SystemExit, match=r"TORCH_CUDA_ARCH_LIST has 'Hoper'; accepted are versions such as .* Hopper"):
        setup.architecture_flags({"TORCH_CUDA_ARCH_LIST": "8.0;Hoper"})


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


@pytest.mark.parametrize(
    "wanted", ["Ampere", "Hopper", "Ampere;Hopper", "Turing Ada", "Volta+Tegra;8.0", "9.0a", "8.0;9.0+PTX", "Blackwell"]
)
def test_architectures_are_those_torch_reads(setup, wanted, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wanted)
    flags = setup.architecture_flags({"TORCH_CUDA_ARCH_LIST": wanted})
    assert sorted(flags) == cpp_extension._get_cuda_arch_flags()


@pytest.mark.parametrize("wanted", ["8.0;9.0+PTX;", ";8.0;9.0+PTX", "8.0 ; 9.0+PTX", "8.0,9.0+PTX,", "8.0;;Hopper;9.0"])
def test_separators_around_and_between_architectures_do_not_matter(setup, wanted):
    assert setup.architecture_flags({"TORCH_CUDA_ARCH_LIST": wanted}) == setup.architecture_flags({})


def test_no_fast_math(setup):
    assert not any("fast" in flag for flag in setup.CXX_FLAGS + setup.NVCC_FLAGS)


# This machine's own toolkit must not be found where a test says that there is none.
DRIVER = "import sys, setup; sys.argv[0] = 'setup.py'; setup.USUAL_TOOLKIT = '/nowhere'; setup.main()"


def answering(folder: Path) -> dict[str, str]:
    """What a compiler does that is asked for its libstdc++, by what it has."""
    archive, shared = folder / "libstdc++.a", folder / "libstdc++.so"
    return {
        "both": f"case $1 in *.so) echo {shared};; *) echo {archive};; esac",
        "neither": "echo ${1#*=}",  # of LLVM's library
        "archive": f"case $1 in *.so) echo ${{1#*=}};; *) echo {archive};; esac",
    }


def test_a_compiler_with_an_archive_alone_links_the_libstdcxx_that_torch_uses(setup, tmp_path):
    scripts = answering(tmp_path)
    found = {name: setup.shared_runtime_flags([str(executable(tmp_path / name, scripts[name]))]) for name in scripts}
    assert found.pop("archive") == libstdcxx()
    assert found == {"both": [], "neither": []}


def test_the_build_hands_that_library_to_the_linker(setup, tmp_path, monkeypatch):
    compiler, given = executable(tmp_path / "c++", answering(tmp_path)["archive"]), {}
    monkeypatch.setattr(setup, "setup", given.update)
    monkeypatch.setattr(sys, "argv", ["setup.py", "build_ext"])
    monkeypatch.setenv("ADVFLOW_CUDA", "0")
    setup.main()
    monkeypatch.setattr(cpp_extension.BuildExtension, "build_extensions", lambda self: None)
    build = given["cmdclass"]["build_ext"](Distribution({"ext_modules": given["ext_modules"]}))
    build.extensions, build.build_temp, build.build_lib = given["ext_modules"], str(tmp_path), str(tmp_path)
    build.compiler = SimpleNamespace(compiler_cxx=[str(compiler)])
    (tmp_path / "advflow_ext").mkdir()
    build.build_extensions()
    assert given["ext_modules"][0].extra_link_args == libstdcxx()


def test_a_library_named_first_is_linked_instead_of_the_archive(tmp_path):
    if any(shutil.which(program) is None for program in ("g++", "nm")):
        pytest.skip("needs g++ and nm")
    archive = subprocess.run(["g++", "-print-file-name=libstdc++.a"], capture_output=True, text=True, check=True).stdout
    if not Path(archive.strip()).is_absolute() or not libstdcxx():
        pytest.skip("needs libstdc++.a, and libstdc++.so in this process")
    source, module = tmp_path / "a.cpp", tmp_path / "a.so"
    source.write_text("#include <sstream>\nbool f(long n) { std::ostringstream s; s << n; return s.good(); }")
    own = {}
    for name, more in {"archive": [], "named": libstdcxx()}.items():
        subprocess.run(["g++", "-shared", "-fPIC", source, *more, "-static-libstdc++", "-o", module], check=True)
        defined = subprocess.run(["nm", "-D", "--defined-only", module], capture_output=True, text=True, check=True)
        own[name] = "_ZNSo9_M_insertIlEERSoT_" in defined.stdout  # std::ostream << long
    assert own == {"archive": True, "named": False}


def libstdcxx() -> list[str]:
    """The first of this process."""
    return re.findall(r"/.*/libstdc\+\+\.so\.6\S*", Path("/proc/self/maps").read_text())[:1]


def run_setup(arguments: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    unset = ("CUDA_HOME", "CUDA_PATH", "CXX", "ADVFLOW_CUDA", "TORCH_CUDA_ARCH_LIST")
    return subprocess.run(
        [sys.executable, "-c", DRIVER, *arguments],
        cwd=ROOT,
        env={**{k: v for k, v in os.environ.items() if k not in unset}, **environment},
        capture_output=True,
        text=True,
    )


def refusal(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode != 0 and "Traceback" not in result.stderr
    return result.stderr.strip().splitlines()[-1]


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


def test_nvcc_of_another_cuda_than_torchs_is_refused_before_compiling(tmp_path):
    fake_torch(tmp_path, "2.13.0+cu130", cuda="13.0")
    nvcc = fake_nvcc(tmp_path / "toolkit", "12.8.93")
    result = run_setup(build_into(tmp_path), PYTHONPATH=str(tmp_path), CUDA_HOME=str(tmp_path / "toolkit"))
    assert refusal(result) == (
        f"advflow-ext: {nvcc} is of CUDA 12.8.93 but torch 2.13.0+cu130 is built for CUDA 13.0; set CUDA_HOME to a "
        "toolkit of CUDA 13, or ADVFLOW_CUDA=0 for CPU kernels alone."
    )
    assert not (tmp_path / "temp").exists() and not (tmp_path / "toolkit" / "compiled").exists()


@pytest.mark.parametrize(("torch_cuda", "fits"), [(None, True), ("13.2", True), ("12.8", False), ("1.3", False)])
def test_one_major_version_of_cuda_in_a_process(setup, torch_cuda, fits):
    if fits:
        setup.require_one_cuda("nvcc", "13.0.88", "2.13.0", torch_cuda)
    else:
        with pytest.raises(SystemExit, match="nvcc is of CUDA 13.0.88 but torch 2.13.0 is built for CUDA"):
            setup.require_one_cuda("nvcc", "13.0.88", "2.13.0", torch_cuda)


@pytest.mark.parametrize("version", ["2.10.0+cu128", "2.9.1", "1.13.1", "2.10.0a0+git12"])
def test_an_older_torch_is_refused_before_compiling(tmp_path, version):
    fake_torch(tmp_path, version)
    result = run_setup(build_into(tmp_path), PYTHONPATH=str(tmp_path))
    assert refusal(result).startswith(f"advflow-ext: torch is {version}; accepted is 2.11 or newer")


@pytest.mark.parametrize("version", ["2.11.0", "2.13.0+cpu", "2.15.0a0+git12", "3.0.0"])
def test_newer_torches_are_taken(setup, version):
    setup.require_torch_release(version)


def test_an_nvcc_that_does_not_answer_is_refused(setup, tmp_path):
    with pytest.raises(SystemExit, match=r"nvcc cannot be run .*; set CUDA_HOME to a toolkit that works"):
        setup.cuda_version(str(executable(tmp_path / "broken" / "nvcc", "exit 3")))
    with pytest.raises(SystemExit, match=r"nvcc --version names no CUDA version"):
        setup.cuda_version(str(executable(tmp_path / "silent" / "nvcc")))
    assert setup.cuda_version(str(fake_nvcc(tmp_path / "good", "12.8.93"))) == "12.8.93"


def test_architectures_nvcc_does_not_know_are_refused_before_compiling(tmp_path):
    fake_torch(tmp_path, "2.13.0+cu130", cuda="13.0")
    fake_nvcc(tmp_path / "toolkit", "13.0.88", "compute_80 compute_90")
    result = run_setup(
        build_into(tmp_path),
        PYTHONPATH=str(tmp_path), CUDA_HOME=str(tmp_path / "toolkit"), TORCH_CUDA_ARCH_LIST="Volta;9.0a",
    )  # fmt: skip
    assert "TORCH_CUDA_ARCH_LIST asks for compute_70, which" in refusal(result)
    assert "it knows compute_80, compute_90." in refusal(result)
    assert not (tmp_path / "toolkit" / "compiled").exists()


def test_what_is_built_is_named_by_its_torch_and_cuda(setup, tmp_path):
    nvcc = fake_nvcc(tmp_path / "toolkit", "13.0.88", "compute_80 compute_90")
    environment = {"CUDA_HOME": str(tmp_path / "toolkit"), "PATH": os.environ["PATH"]}
    fake_torch(tmp_path, "2.15.0+cu132", cuda="13.2")
    torch = importlib.util.module_from_spec(
        importlib.util.spec_from_file_location("fake_torch", tmp_path / "torch" / "__init__.py")
    )
    torch.__spec__.loader.exec_module(torch)
    plan = setup.make_plan(environment, torch)
    assert plan.nvcc == str(nvcc) and plan.label == "+torch2.15.0.cu130"
    assert setup.make_plan({**environment, "ADVFLOW_CUDA": "0"}, torch).label == "+torch2.15.0.cpu"


def test_the_metadata_that_pip_prepares_carry_the_label(tmp_path):
    import torch

    result = run_setup(["-q", "dist_info", "--output-dir", str(tmp_path)], ADVFLOW_CUDA="0")
    assert result.returncode == 0, result.stderr
    (folder,) = tmp_path.glob("*.dist-info")
    metadata = (folder / "METADATA").read_text()
    release = torch.__version__.split("+")[0]
    assert f"\nVersion: 0.1.0+torch{release}.cpu\n" in metadata
    assert re.findall(r"Requires-Dist: (torch[^;\n]*)\n", metadata) == [f"torch=={release}"]  # or pip takes another's
    assert "\nProject-URL: " in metadata and "\nClassifier: " in metadata


def test_a_build_that_hides_torch_finds_it_where_it_is_installed(setup, monkeypatch, tmp_path):
    """pip's isolated build runs this interpreter with its site-packages taken off sys.path."""
    fake_torch(tmp_path, "2.13.0")
    monkeypatch.setattr(setup.site, "getsitepackages", lambda: [str(tmp_path)])
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if not (Path(entry) / "torch").is_dir()])
    for name in [name for name in sys.modules if name == "torch"]:
        monkeypatch.delitem(sys.modules, name)
    assert setup.import_torch().__file__ == str(tmp_path / "torch" / "__init__.py")


def test_what_is_compiled_for_one_torch_is_compiled_again_for_another(setup, tmp_path):
    header = tmp_path / "generated" / "info.h"
    setup.write_if_changed(header, "torch 2.13.0")
    os.utime(header, (1, 1))
    setup.write_if_changed(header, "torch 2.13.0")
    assert header.stat().st_mtime == 1
    setup.write_if_changed(header, "torch 2.15.0")
    assert header.stat().st_mtime > 1 and header.read_text() == "torch 2.15.0"


def test_a_build_without_torch_ends_in_one_sentence(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('No module named torch')\n")
    result = run_setup(["--version"], PYTHONPATH=str(tmp_path))
    assert result.returncode != 0 and "Traceback" not in result.stderr
    assert "torch cannot be imported here" in result.stderr and "--no-build-isolation" in result.stderr


LINK = re.compile(r"\]\((?!https?://|#)([^)#]+)")


def test_the_source_archive_holds_what_a_build_needs_and_what_the_readme_names(tmp_path):
    # From a copy: the archive's by-products must not land in the tree.
    tree = tmp_path / "tree"
    ignore = shutil.ignore_patterns(".git", ".venv*", ".*_cache", "build", "runs", "*.egg-info")
    shutil.copytree(ROOT, tree, ignore=ignore)
    # No torch is asked for: whoever makes the archive may have none.
    (tmp_path / "torch.py").write_text("raise ImportError('No module named torch')\n")
    result = subprocess.run(
        [sys.executable, "setup.py", "-q", "sdist", "-d", str(tmp_path)],
        cwd=tree, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as content:
        names = {name.partition("/")[2] for name in content.getnames()}
    needed = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*") if path.suffix != ".pyc"}
    needed |= {"setup.py", "pyproject.toml", "LICENSE", "advflow_ext/__init__.py", "advflow_ext/py.typed"}
    needed |= {
        ".ci/run",
        "Makefile",
        "mkdocs.yml",
        "requirements-newest.txt",
        ".clang-format",
        "python/pyproject.toml",
        "python/advflow/configs/tiny.yaml",
    }
    named = LINK.findall((ROOT / "README.md").read_text())
    assert len(named) > 10
    needed |= {link.rstrip("/") for link in named}
    for page in (ROOT / "docs").glob("*.md"):
        needed |= {os.path.normpath(f"docs/{link}") for link in LINK.findall(page.read_text())}
    assert not needed - names
    assert not any(name.endswith((".so", "_build.json", ".pyc")) for name in names)
