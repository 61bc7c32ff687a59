"""advflow-doctor where all is well, and in every bad state it knows, simulated."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch

import advflow_ext as af
from advflow_ext import _native, integrations
from advflow_ext.doctor import machine, page, selftest
from advflow_ext.doctor.__main__ import document, main
from advflow_ext.doctor.advice import Advice, advice
from advflow_ext.doctor.selftest import Trial
from advflow_ext.doctor.trainers import Trainer
from advflow_ext.losses import LOSSES
from tests.build.test_import import HEAVY, HIDE_NATIVE

native = pytest.mark.skipif(not _native.serves(torch.empty(1)), reason="without kernels the doctor finds that wrong")
RUN = "import sys; from advflow_ext.doctor.__main__ import main; sys.exit(main(['--json']))"
BLOCKS = "joint_qk_norm", "layer_norm_modulate", "gate_residual", "gate_residual_layer_norm_modulate", "lora_linear"


class NoTrainers:
    """In place of the other process, which takes seconds."""

    def found(self) -> list[Trainer]:
        return [Trainer("stand_in", "absent")]


@pytest.fixture
def alone(monkeypatch):
    monkeypatch.setattr("advflow_ext.doctor.__main__.Attempt", NoTrainers)
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # its kernels take their time to compile


@native
def test_where_all_is_well_every_op_was_tried(alone, capsys):
    assert main([]) == 0
    said = capsys.readouterr().out
    assert said.endswith("Everything works here.\n") and "!!" not in said
    lines = said.splitlines()
    assert max(map(len, lines)) <= 80 and "\033" not in said
    for op in (*LOSSES, "sde_step", "transition_log_prob", "transition_noise", "awm_log_prob", "gaussian_kl"):
        (line,) = (line for line in lines if line.startswith(f"  ok {op} "))
        assert " cpu  native " in line
    for op in BLOCKS:
        assert any(line.startswith(f"  ok {op} ") for line in lines)
    assert f"torch {' ' * 7}{torch.__version__}" in said and "stand_in" in said


@native
def test_as_a_program_it_ends_with_0_and_imports_nothing_slow():
    heavy = (HEAVY - {"tqdm"}) | {"torch._dynamo", "torch._inductor"}  # torch itself imports tqdm where it is
    tell = f"\nexcept SystemExit as end: print(end.code, sorted({heavy!r} & set(sys.modules)), file=sys.stderr)"
    result = subprocess.run([sys.executable, "-c", f"try:\n {RUN}{tell}"], capture_output=True, text=True, check=True)
    assert result.stderr.splitlines()[-1] == "0 []"
    found = json.loads(result.stdout)
    assert found["ok"] and found["versions"]["torch"] == torch.__version__
    assert [each["name"] for each in found["trainers"]] == list(integrations.TRAINERS)
    assert all(trial["right"] and trial["error"] <= trial["allowed"] for trial in found["self_test"])
    assert {(trial["device"], trial["dtype"]) for trial in found["self_test"]} >= {("cpu", "fp32"), ("cpu", "bf16")}


def test_the_program_that_is_installed_is_this_one():
    scripts = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text())["project"]["scripts"]
    assert EntryPoint("advflow-doctor", scripts["advflow-doctor"], "console_scripts").load() is main


def test_without_a_compiled_module_it_ends_with_1_and_says_how_to_build_it():
    result = subprocess.run([sys.executable, "-c", HIDE_NATIVE + RUN], capture_output=True, text=True)
    assert result.returncode == 1
    found = json.loads(result.stdout)
    assert not found["ok"] and found["build"]["built"] is None
    assert all(trial["right"] and trial["by"] in ("reference", "PyTorch") for trial in found["self_test"])
    (wrong,) = (each["sentence"] for each in found["advice"] if each["wrong"])
    assert "no usable compiled module" in wrong and "pip install --no-build-isolation ." in wrong


@native
@pytest.mark.parametrize("state", ["interface", "torch"])
def test_a_module_that_does_not_fit_is_named(state, alone, monkeypatch, capsys, tmp_path):
    if state == "interface":
        monkeypatch.setattr(_native, "INTERFACE", _native.INTERFACE + 1)
        expected = "compiled module belongs to another version of the package; reinstall it"
    else:
        record = tmp_path / "_build.json"
        record.write_text(json.dumps({"torch": "2.4.1+cu121"}))
        monkeypatch.setattr(_native, "BUILD_RECORD", record)
        monkeypatch.setattr(_native, "_sources_digest", lambda: None)  # of the tree, whose record says nothing of them
        monkeypatch.setattr(_native, "_built_copies", lambda: iter(()))
        expected = f"was built for torch 2.4.1+cu121 but torch {torch.__version__} is installed; reinstall it"
    module, problem = _native._load()
    for name, value in (("module", module), ("problem", problem), ("DEVICES", frozenset())):
        monkeypatch.setattr(_native, name, value)
    assert main([]) == 1
    said = capsys.readouterr().out
    assert "  !! compiled    nothing usable" in said and said.endswith("1 thing is wrong here.\n")
    assert expected in " ".join(said.split())


def wrong_by_a_thousandth(**given: Any) -> Any:
    out = af.reference.flow_grpo_loss(**given)
    return af.LossOutput(out.loss * 1.001, out.metrics)


def raising(**given: Any) -> Any:
    raise RuntimeError("CUDA error: no kernel image\nand more")


def not_finite(**given: Any) -> Any:
    out = af.reference.flow_grpo_loss(**given)
    return af.LossOutput(out.loss * math.nan, out.metrics)


@pytest.mark.parametrize(
    ("op", "sign"),
    [
        (wrong_by_a_thousandth, "fp32: allowed is 1e-05"),
        (raising, "fp32: RuntimeError: CUDA error: no kernel image\n"),
        (not_finite, "-----"),
    ],
)
def test_an_op_that_fails_is_named_and_the_others_are_still_tried(op, sign, alone, monkeypatch, capsys):
    monkeypatch.setattr(af, "flow_grpo_loss", op)
    assert main([]) == 1
    said = capsys.readouterr().out
    assert "  !! flow_grpo_loss" in said and "  ok sde_step" in said and sign in said
    assert "Wrong against the float64 reference: flow_grpo_loss on cpu in fp32" in " ".join(said.split())


def test_an_op_of_a_block_that_fails_is_named_too(alone, monkeypatch):
    monkeypatch.setattr(af.nn, "gate_residual", lambda h, *branches: h * math.nan)
    failed = {trial.op for trial in selftest.trials(("cpu",)) if not trial.right}
    assert failed == {"gate_residual", "gate_residual_trained"}


def test_what_is_not_finite_is_null_in_json():
    trial = Trial("op", "cpu", "fp32", "native", math.inf, 1e-5)
    (found,) = document({}, [], [trial], [])["self_test"]
    assert found["error"] is None and found["right"] is False


def facts(**changed: Any) -> dict[str, Any]:
    """Of a machine with a GPU where all is well."""
    built = {"torch": "2.13.0", "cuda": True, "nvcc": "13.0.88", "architectures": ["sm_80", "sm_90", "compute_90"]}
    known: dict[str, Any] = {
        "environment": {
            "python": "3.12.1", "platform": "Linux", "cpu": "a cpu", "cores": 8, "threads": 8,
            "variables": {}, "nvidia_driver": True,
        },
        "build": {
            "advflow_ext": "0.1.0", "package": "site-packages/advflow_ext", "built": built | {"compiler": "c++ 12"},
            "problem": "", "usable": {"cpu": "native kernels", "cuda": "native kernels"},
        },
        "devices": [{"name": "NVIDIA H200", "memory_bytes": 2**37, "architecture": "sm_90", "served": True}],
        "versions": {"torch": "2.13.0", "triton": "3.9.0", "diffusers": "0.42.1"},
    }  # fmt: skip
    rooms: list[Any] = [known["environment"], known["build"]["built"], known["versions"], known]
    for name, value in changed.items():
        room = next(room for room in rooms if name in room)
        room[name] = value
    return known


def told(found: list[Trainer] | None = None, **changed: Any) -> list[tuple[bool, str]]:
    return [(each.wrong, each.sentence) for each in advice(facts(**changed), found or [], [])]


def test_nothing_is_advised_where_all_is_well():
    assert told() == []


@pytest.mark.parametrize(
    ("changed", "wrong", "words"),
    [
        ({"cuda": False}, True, "There is a NVIDIA H200, but only CPU kernels were built"),
        ({"triton": None}, True, "Triton is not installed"),
        ({"devices": []}, False, "There is an NVIDIA driver, but torch 2.13.0 sees no CUDA device"),
        ({"threads": 9}, False, "torch uses 9 threads on 8 cores: 'export OMP_NUM_THREADS=8'"),
        ({"diffusers": "0.30.3"}, False, "diffusers is 0.30.3; apply_to_sd3 takes 0.31 or newer"),
    ],
)
def test_each_state_has_its_sentence(changed, wrong, words):
    found = told(**changed)
    assert [(each_wrong, sentence) for each_wrong, sentence in found if words in sentence and each_wrong == wrong]


def test_a_device_that_no_kernel_runs_on_is_named_with_the_remedy():
    device = facts()["devices"][0] | {"name": "NVIDIA RTX 5090", "architecture": "sm_120", "served": False}
    ((wrong, sentence),) = told(devices=[device])
    assert wrong and "sm_80, sm_90, compute_90, none of which runs on a NVIDIA RTX 5090 (sm_120)" in sentence
    assert "TORCH_CUDA_ARCH_LIST=12.0 pip install" in sentence


def test_waiting_threads_matter_on_the_cpu_alone():
    assert told(variables={"OMP_WAIT_POLICY": "active"}) == []
    cpu = {"devices": [], "nvidia_driver": False}
    ((wrong, sentence),) = told(**cpu, variables={"OMP_WAIT_POLICY": "active"})
    assert not wrong and sentence.startswith("OMP_WAIT_POLICY is not PASSIVE")
    assert told(**cpu, variables={"OMP_WAIT_POLICY": "passive"}) == []


@pytest.mark.parametrize(
    ("capability", "architectures", "served"),
    [
        ((8, 0), ["sm_80"], True),
        ((8, 6), ["sm_80"], True),
        ((8, 0), ["sm_86"], False),
        ((9, 0), ["sm_80"], False),
        ((12, 0), ["sm_90", "compute_90"], True),
        ((7, 5), ["sm_80", "compute_80"], False),
        ((9, 0), ["sm_90a"], True),
        ((10, 0), ["compute_90a"], False),
        ((12, 0), ["sm_120"], True),
        ((9, 0), [], False),
    ],
)
def test_which_kernels_run_where(capability, architectures, served):
    assert machine.is_served(capability, architectures) == served


def test_colours_are_for_terminals():
    given = [Advice(True, "word " * 40), Advice(False, "Worth knowing.")]
    found = [Trainer("flow_grpo", "known"), Trainer("dance_grpo", "unknown", "its import had not ended after 60 s")]
    tried = [Trial("op", "cuda", "fp32", "native", 1e-7, 1e-5), Trial("op", "cuda", "bf16", "native", 1e-3, 4e-3)]
    plain = page.page(facts(), found, tried, given, coloured=False)
    assert max(map(len, plain.splitlines())) <= 80 and "\033" not in plain
    assert "  ok GPU    NVIDIA H200, 128 GiB, sm_90" in plain and plain.endswith("1 thing is wrong here.")
    assert "could not be tried: its import had not ended" in plain
    coloured = page.page(facts(), found, tried, given, coloured=True)
    assert "\033[32mok\033[0m" in coloured and "\033[31;1m!!\033[0m" in coloured
    for code in ("\033[32m", "\033[31;1m", "\033[33m", "\033[0m"):
        coloured = coloured.replace(code, "")
    assert coloured == plain
