"""A checkout in front of what was installed from it: the built copy is used aloud, or the sentence says why not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import advflow_ext as af
from advflow_ext import _native

ROOT = Path(__file__).resolve().parents[2]
SHOW = "import advflow_ext as af; print(af.__file__); print(af._native.module and af._native.module.__file__)"

pytestmark = pytest.mark.skipif(
    _native.module is None or _native.PACKAGE.parent != ROOT, reason="needs the tree and a module compiled in it"
)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A checkout in which nothing was built."""
    folder = tmp_path / "tree"
    built = shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
    shutil.copytree(ROOT / "advflow_ext", folder / "advflow_ext", ignore=built)
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    return folder


@pytest.fixture
def installed(tmp_path: Path, tree: Path) -> Path:
    """What `pip install .` there would have put into site-packages."""
    package = tmp_path / "site-packages" / "advflow_ext"
    shutil.copytree(tree / "advflow_ext", package)
    shutil.copy(str(_native.module.__file__), package)  # type: ignore[union-attr]  # or these tests are skipped
    record(package, torch=torch.__version__, sources=_native._sources_digest(), label=_native.LABEL)
    return package


def record(package: Path, **entries: str) -> None:
    path = package / "_build.json"
    built = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(built | entries))


def show(cwd: Path, *paths: Path, command: tuple[str, ...] = ("-c", SHOW)) -> tuple[list[str], str]:
    # -S: what the test run's own environment has installed, this tree perhaps, plays no part; torch is brought back.
    site = Path(torch.__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (*paths, site)))}
    result = subprocess.run(
        [sys.executable, "-S", *command], cwd=cwd, env=environment, capture_output=True, text=True, check=True
    )
    return result.stdout.splitlines(), result.stderr


@pytest.mark.parametrize("way", ["-c", "-m", "script in the root", "PYTHONPATH"])
def test_the_built_copy_serves_a_tree_in_front_of_it_and_says_so(tree, installed, way):
    cwd, paths, command = tree, [installed.parent], ("-c", SHOW)
    if way == "-m":
        command = ("-m", "advflow_ext.info")
    elif way == "script in the root":
        (tree / "mine.py").write_text(SHOW)
        command = ("mine.py",)
    elif way == "PYTHONPATH":
        cwd, paths = tree.parent, [tree, installed.parent]
    lines, said = show(cwd, *paths, command=command)
    module = str(installed / Path(_native.module.__file__).name)
    if way == "-m":
        assert f"imported from {tree / 'advflow_ext'}" in lines and f"compiled module {module}" in lines
        assert "  cpu   native kernels" in lines
    else:
        assert lines == [str(tree / "advflow_ext" / "__init__.py"), module]
    assert said.count("RuntimeWarning") == 1
    assert f"imported from the source tree {tree}; the built copy is at {installed}, whose compiled module" in said


def test_away_from_the_tree_nothing_is_said(tree, installed):
    lines, said = show(tree.parent, installed.parent)
    assert lines[0] == str(installed / "__init__.py") and said == ""


def test_the_tests_of_a_tree_are_of_what_is_installed(tmp_path, installed):
    """As `make test-newest` runs them: by pytest's own program, which does not put the current folder first."""
    (tmp_path / "which.py").write_text(
        "import sys\ndef pytest_unconfigure(config): print('tested:', sys.modules['advflow_ext'].__file__)\n"
    )
    files = "tests/ops/test_reward_weighted.py", "tests/bench/test_render.py"
    pytest_alone = ("-P", "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", "-p", "which", *files)
    lines, _ = show(ROOT, tmp_path, installed.parent, command=pytest_alone)
    assert lines[-1] == f"tested: {installed / '__init__.py'}"


@pytest.mark.parametrize("change", ["sources of the tree", "record of an older build", "torch"])
def test_a_copy_that_does_not_belong_to_the_tree_is_not_used_and_says_why(tree, installed, change):
    if change == "sources of the tree":
        (tree / "csrc" / "launchers.h").write_text("// another")
    elif change == "record of an older build":
        (installed / "_build.json").write_text(json.dumps({"torch": torch.__version__}))
    else:
        record(installed, torch="2.4.1+cu121")
    reason = "was built for torch 2.4.1+cu121 but torch" if change == "torch" else "was built from other sources"
    lines, said = show(tree, installed.parent)
    assert lines[1] == "None"
    assert f"the built copy is at {installed} and {reason}" in said
    assert "reinstall it with 'pip install --no-build-isolation .'" in said


def test_a_tree_alone_says_that_nothing_is_built(tree):
    lines, said = show(tree)
    assert lines[1] == "None" and "advflow_ext has no usable compiled module" in said


def test_a_module_in_the_tree_serves_it_and_a_stale_one_gives_way_to_the_copy(tree, installed):
    for name in (Path(_native.module.__file__).name, "_build.json"):
        shutil.copy(installed / name, tree / "advflow_ext")
    own = str(tree / "advflow_ext" / Path(_native.module.__file__).name)
    assert show(tree, installed.parent) == ([str(tree / "advflow_ext" / "__init__.py"), own], "")
    record(tree / "advflow_ext", sources="of another day")
    lines, said = show(tree, installed.parent)
    assert lines[1] == str(installed / Path(own).name) and "whose compiled module is used" in said


def test_the_version_is_this_sources_and_names_what_serves(tree, installed):
    code = ("-c", "import advflow_ext; print(advflow_ext.__version__)")
    assert show(tree, command=code)[0] == ["0.1.0"]
    distribution = installed.parent / "advflow_ext-9.9.dist-info"  # of something else that is installed
    distribution.mkdir()
    (distribution / "METADATA").write_text("Metadata-Version: 2.4\nName: advflow-ext\nVersion: 9.9\n")
    assert show(tree, installed.parent, command=code)[0] == [af.__version__]
    assert show(tree.parent, installed.parent, command=code)[0] == [af.__version__]
    assert af.__version__ == "0.1.0" + _native.build_info().get("label", "")


def test_the_version_is_written_alike_everywhere():
    import tomllib

    for folder in (ROOT, ROOT / "python"):
        project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
        assert project["version"] == af.__version__.split("+")[0]
        assert project["urls"] and project["classifiers"]


def test_setup_and_the_package_agree_on_what_sources_are(monkeypatch):
    import importlib.util

    spec = importlib.util.spec_from_file_location("advflow_setup", ROOT / "setup.py")
    setup = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "advflow_setup", setup)
    spec.loader.exec_module(setup)
    assert setup.sources_digest() == _native._sources_digest()
