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
