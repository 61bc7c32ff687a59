"""Importing the package: light, and honest about a missing or foreign compiled module."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

import advflow_ext as af
from advflow_ext import _native, info

# What the trainer and the tests need and a user of the losses must not pay for.
HEAVY = {
    "advflow", "accelerate", "datasets", "diffusers", "hypothesis", "jsonargparse", "matplotlib", "pandas", "peft",
    "PIL", "pytest", "safetensors", "scipy", "tensorboard", "torchvision", "tqdm", "transformers", "triton", "yaml",
}  # fmt: skip

HIDE_NATIVE = "import sys; sys.modules['advflow_ext._C'] = None\n"

STEP = """
import torch, advflow_ext as af
v = torch.randn(2, 3, requires_grad=True)
x = torch.randn(2, 3)
for _ in range(2):
    af.advantage_flow_loss(v, x, x, torch.tensor([0.5, 1.0]), torch.ones(2), v_old=x).loss.backward()
"""


def python(source: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)


def test_import_loads_nothing_but_torch():
    listing = (
        "import sys, torch; before = set(sys.modules)\n"
        "import advflow_ext; print(*{name.partition('.')[0] for name in set(sys.modules) - before})"
    )
    assert not HEAVY & set(python(listing).stdout.split())


def test_without_a_compiled_module_the_reference_serves_and_says_so_once():
    result = python(HIDE_NATIVE + STEP)
    assert result.stderr.count("RuntimeWarning") == 1
    assert "advflow_ext has no usable compiled module" in result.stderr
    assert "pip install --no-build-isolation ." in result.stderr


def test_with_a_compiled_module_nothing_is_said():
    assert "advflow" not in python(STEP).stderr


def test_a_module_built_for_another_torch_is_not_loaded(tmp_path, monkeypatch):
    record = tmp_path / "_build.json"
    record.write_text(json.dumps({"torch": "2.4.1+cu121"}))
    monkeypatch.setattr(_native, "BUILD_RECORD", record)
    monkeypatch.setattr(_native, "_built_copies", lambda: iter(()))  # what is installed beside this tree may serve it
    module, problem = _native._load()
    assert module is None
    assert f"built for torch 2.4.1+cu121 but torch {torch.__version__} is installed" in problem


def test_a_local_torch_label_does_not_matter(tmp_path, monkeypatch):
    record = tmp_path / "_build.json"
    record.write_text(json.dumps({"torch": torch.__version__.split("+")[0] + "+cu999"}))
    monkeypatch.setattr(_native, "BUILD_RECORD", record)
    assert _native._load()[0] is _native.module


def test_constants_that_differ_from_python_are_refused(monkeypatch):
    monkeypatch.setattr(_native, "STATS", ("vu_sq",))
    module, problem = _native._load()
    assert module is None and "belongs to another version of the package" in problem


def test_a_module_from_before_the_last_change_of_an_operator_is_refused(monkeypatch):
    monkeypatch.delattr(_native.module, "INTERFACE")
    module, problem = _native._load()
    assert module is None and "belongs to another version of the package" in problem


def test_build_record():
    record = _native.build_info()
    assert record is not None
    assert record["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert record["cuda"] == ("cuda" in _native.DEVICES) == bool(record["architectures"])


def test_info_tells_what_was_built_and_what_is_usable():
    result = subprocess.run([sys.executable, "-m", "advflow_ext.info"], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == info.report()
    for words in (f"torch {torch.__version__}", "usable here", "cpu   native kernels", "compiler_flags"):
        assert words in result.stdout
    hidden = python(HIDE_NATIVE + "import runpy; runpy.run_module('advflow_ext.info', run_name='__main__')")
    assert "nothing usable" in hidden.stdout and "cpu   PyTorch reference" in hidden.stdout


WITHOUT_CUDA = "from advflow_ext import _native; _native.DEVICES = frozenset({'cpu'})\n"


def test_info_says_that_only_cpu_kernels_were_built_whatever_the_torch():
    for torch_cuda in ("None", "'13.0'"):
        line = python(
            f"import torch; torch.version.cuda = {torch_cuda}\n{WITHOUT_CUDA}"
            "from advflow_ext import info; print(info.report())"
        ).stdout.splitlines()[-1]
        assert line.startswith("  cuda  PyTorch reference (no CUDA kernels were built; ADVFLOW_CUDA=1")


@pytest.mark.parametrize("compiled", [False, True])
def test_the_first_cuda_tensor_says_that_only_cpu_kernels_were_built(compiled):
    # A CPU tensor in the part of the CUDA one, which no GPU is needed for.
    step = "af.advantage_flow_loss(v, x, x, torch.tensor([0.5, 1.0]), torch.ones(2), v_old=x).loss"
    said = python(
        "import torch, advflow_ext as af\nfrom advflow_ext import _native\n"
        "_native.DEVICES = frozenset({'cuda'})\n"
        f"v, x = torch.randn(2, 3), torch.randn(2, 3)\nstep = lambda v: {step}\n"
        + ("step = torch.compile(step, backend='eager', fullgraph=True)\n" if compiled else "")
        + "step(v), step(v)"
    ).stderr
    assert said.count("advflow_ext was built without cpu kernels: the slower PyTorch reference serves") == 1
    with torch._subclasses.FakeTensorMode(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(_native, "DEVICES", frozenset({"cpu"}))
        patch.setattr(_native, "_devices_warned_of", set())
        with pytest.warns(RuntimeWarning, match=r"without cuda kernels: .*; reinstall it where nvcc is found"):
            assert not _native.serves(torch.empty(2, device="cuda"))


def test_public_names():
    assert af.__all__ == sorted(af.__all__)
    assert {"advantage_flow_loss", "group_advantages", "reference"} <= set(af.__all__)
    assert all(getattr(af, name).__doc__ for name in af.__all__)


@pytest.mark.parametrize("name", af.__all__)
def test_every_public_docstring_says_what_raises_or_what_it_is(name):
    text = getattr(af, name).__doc__
    assert len(text) > 40
    if name in ("advantage_flow_loss", "group_advantages"):
        assert "Raises ValueError" in text and "AdvantageFlow" in text
