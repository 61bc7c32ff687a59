"""csrc/wheels.py: which wheels, by which interpreter, under which name. What it builds, it tests itself."""

from __future__ import annotations

import importlib.util
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import advflow_ext as af

ROOT = Path(__file__).resolve().parents[2]


def load(path: Path, monkeypatch):
    spec = importlib.util.spec_from_file_location(f"advflow_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # where dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def wheels(monkeypatch, tmp_path):
    module = load(ROOT / "csrc" / "wheels.py", monkeypatch)
    for name, folder in (("ROOT", tmp_path), ("DIST", tmp_path / "dist"), ("LOGS", tmp_path / "logs")):
        monkeypatch.setattr(module, name, folder)
    return module


def interpreter(path: Path, answer: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{answer}\n")
    path.chmod(0o755)
    return path


def test_pairs_are_ordered_by_number_and_each_is_built_once(wheels):
    words = ["3.12:2.15.0", "3.9:2.11.0", "3.12:2.9.1", "3.12:2.15.0", "3.12:2.11.0"]
    assert [str(pair) for pair in wheels.parse_pairs(words)] == [
        "3.9:2.11.0",
        "3.12:2.9.1",
        "3.12:2.11.0",
        "3.12:2.15.0",
    ]


@pytest.mark.parametrize(
    "word", ["3.12", "3.12:2.11", "2.11.0", "3.12-2.11.0", "3.12.1:2.11.0", "3.12:2.11.0+cpu", "py:2.11.0"]
)
def test_what_is_no_pair_is_refused(wheels, word):
    with pytest.raises(
        SystemExit, match=r"PAIRS has '.*'; accepted are Python and torch's full release, such as 3.12:2.11.0"
    ):
        wheels.parse_pairs(["3.12:2.11.0", word])


def test_the_matrix_is_what_the_package_promises(wheels, monkeypatch):
    setup = load(ROOT / "setup.py", monkeypatch)
    releases = [tuple(int(part) for part in torch.split(".")) for torch in wheels.TORCHES]
    assert releases[0][:2] == setup.MINIMUM_TORCH
    assert [release[:2] for release in releases] == [(2, minor) for minor in range(releases[0][1], releases[-1][1] + 1)]
    classifiers = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["classifiers"]
    named = [line.rpartition(" ")[2] for line in classifiers if line.startswith("Programming Language :: Python :: 3.")]
    assert named and set(named) <= set(wheels.PYTHONS)
    newest = (ROOT / "requirements-newest.txt").read_text()
    assert f"torch=={wheels.TORCHES[-1]}\n" in newest


def test_an_interpreter_that_does_not_answer_is_passed_over(wheels, tmp_path):
    environment = {"PATH": str(tmp_path / "shims"), "PYENV_ROOT": str(tmp_path / "pyenv")}
    interpreter(tmp_path / "shims" / "python3.12", "exit 127")  # as a shim of pyenv's without that version
    assert wheels.find_python("3.12", environment) is None
    older = interpreter(tmp_path / "pyenv" / "versions" / "3.12.9" / "bin" / "python", "echo 3.12")
    assert wheels.find_python("3.12", environment) == str(older)
    newer = interpreter(tmp_path / "pyenv" / "versions" / "3.12.10" / "bin" / "python", "echo 3.12")
    assert wheels.find_python("3.12", environment) == str(newer)
    on_path = interpreter(tmp_path / "shims" / "python3.12", "echo 3.12")
    assert wheels.find_python("3.12", environment) == str(on_path)
    interpreter(on_path, "echo 3.11")
    assert wheels.find_python("3.12", environment) == str(newer)


def test_an_interpreter_that_was_named_has_to_be_there(wheels, tmp_path, capsys):
    environment = {"PATH": str(tmp_path), "PYENV_ROOT": str(tmp_path)}
    interpreter(tmp_path / "python3.12", "echo 3.12")
    with pytest.raises(SystemExit, match=r"There is no Python 3.11, 3.13 with venv and Python.h"):
        wheels.choose(["3.11:2.11.0", "3.12:2.11.0", "3.13:2.11.0"], environment)
    assert capsys.readouterr().out == ""
    chosen = wheels.choose([], environment)
    assert [str(pair) for pair in chosen] == [f"3.12:{torch}" for torch in wheels.TORCHES]
    assert set(chosen.values()) == {str(tmp_path / "python3.12")}
    assert "Python 3.11 is neither on PATH nor among pyenv's versions: left out." in capsys.readouterr().out
    (tmp_path / "python3.12").unlink()
    with pytest.raises(SystemExit, match=r"There is no Python 3.11, 3.12, 3.13"):
        wheels.choose([], environment)


def test_the_name_says_whom_a_wheel_is_for(wheels):
    pair = wheels.Pair("3.12", "2.11.0")
    name = "advflow_ext-0.1.0+torch{torch}.{kernels}-cp{python}-cp{python}-linux_x86_64.whl"
    assert wheels.kernels_of(name.format(torch="2.11.0", kernels="cpu", python="312"), pair) == "cpu"
    assert wheels.kernels_of(name.format(torch="2.11.0", kernels="cu130", python="312"), pair) == "cpu, cu130"
    others = [("2.11.0", "cpu", "313"), ("2.11.1", "cpu", "312"), ("2x11.0", "cpu", "312"), ("2.11.0", "rocm", "312")]
    for release, kernels, python in others:
        with pytest.raises(wheels.StepFailed, match=r"is no name for Python 3.12 and torch 2.11.0"):
            wheels.kernels_of(name.format(torch=release, kernels=kernels, python=python), pair)


def test_one_pair_that_fails_ends_neither_the_others_nor_in_success(wheels, monkeypatch, tmp_path, capsys):
    asked = []

    def build_and_test(row, interpreter, archive, earlier, position):
        asked.append((str(row.pair), interpreter, earlier and str(earlier.pair), position))
        if row.pair == wheels.Pair("3.11", "2.13.0"):
            raise wheels.StepFailed("the wheel: exit status 1, see build/wheels/3.11-2.13.0.log")
        row.kernels, row.tested = "cpu", "yes"

    monkeypatch.setattr(wheels, "find_python", lambda version, environment: f"python{version}")
    monkeypatch.setattr(wheels, "make_archive", lambda interpreter: tmp_path / "archive.tar.gz")
    monkeypatch.setattr(wheels, "build_and_test", build_and_test)
    status = wheels.main(["3.12:2.11.0", "3.11:2.13.0", "3.11:2.11.0"])
    said = capsys.readouterr().out
    assert status == 1 and "3.11:2.13.0 failed: the wheel: exit status 1, see build/wheels/3.11-2.13.0.log." in said
    assert asked == [
        ("3.11:2.11.0", "python3.11", None, "[1/3]"),
        ("3.11:2.13.0", "python3.11", "3.11:2.11.0", "[2/3]"),
        ("3.12:2.11.0", "python3.12", None, "[3/3]"),
    ]  # fmt: skip
    assert [line.split()[:4] for line in said.splitlines() if line.startswith("3.1") and " failed" not in line] == [
        ["3.11", "2.11.0", "cpu", "yes"],
        ["3.11", "2.13.0", "-", "-"],
        ["3.12", "2.11.0", "cpu", "yes"],
    ]
    assert wheels.main(["3.12:2.11.0"]) == 0


def test_a_step_that_fails_shows_its_last_words(wheels, tmp_path, capsys):
    steps = wheels.Steps("3.12:2.11.0", "[1/1]")
    steps.run("a good one", sys.executable, "-c", "print('fine')", cwd=tmp_path)
    said = capsys.readouterr().out
    assert said == "[1/1] 3.12:2.11.0: a good one\n"
    with pytest.raises(wheels.StepFailed, match=r"^a bad one: exit status 3, see logs/3.12-2.11.0.log$"):
        steps.run("a bad one", sys.executable, "-c", "print('the reason'); raise SystemExit(3)", cwd=tmp_path)
    assert "    the reason\n" in capsys.readouterr().out
    log = (tmp_path / "logs" / "3.12-2.11.0.log").read_text()
    assert "fine\n" in log and "the reason\n" in log


def commands(wheels, monkeypatch, row, earlier, failing: str = "") -> list[list[str]]:
    """What building and testing a pair runs, and with it no more than a wheel of the right name."""
    ran: list[list[str]] = []

    def run(self, what, *command, cwd):
        words = [str(word).replace(str(cwd), "WORK").replace(str(wheels.DIST), "DIST") for word in command]
        ran.append(words)
        if what == failing:
            raise wheels.StepFailed(f"{what}: exit status 1, see build/wheels/x.log")
        if what == "the wheel":
            (cwd / "dist").mkdir()
            tag = "cp" + row.pair.python.replace(".", "")
            name = f"advflow_ext-0.1.0+torch{row.pair.torch}.cu130-{tag}-{tag}-linux_x86_64.whl"
            (cwd / "dist" / name).write_text("a wheel")

    monkeypatch.setattr(wheels.Steps, "run", run)
    wheels.DIST.mkdir(exist_ok=True)
    archive = wheels.DIST / "advflow_ext-0.1.0.tar.gz"
    wheels.build_and_test(row, "python3.12", archive, earlier, "[2/2]")
    return ran


EARLIER = "advflow_ext-0.1.0+torch2.11.0.cu130-cp312-cp312-linux_x86_64.whl"


def test_the_wheel_before_is_put_beside_this_torch_and_has_to_refuse(wheels, monkeypatch):
    row = wheels.Row(wheels.Pair("3.12", "2.12.1"))
    earlier = wheels.Row(wheels.Pair("3.12", "2.11.0"), wheel=EARLIER, tested="yes")
    ran = commands(wheels, monkeypatch, row, earlier)
    python, check = "WORK/venv/bin/python", str(wheels.CHECK)
    assert ran[1] == [python, "-m", "pip", "install", "-q", "torch==2.12.1"]
    assert ran[4] == [python, "-I", check, "serves", "2.12.1"]
    assert ran[-2:] == [
        [python, "-m", "pip", "install", "-q", "--no-deps", "--force-reinstall", f"DIST/{EARLIER}"],
        [python, "-I", check, "refuses", "2.11.0"],
    ]
    assert (row.kernels, row.tested, row.refuses) == ("cpu, cu130", "yes", "2.11.0")
    assert (wheels.DIST / row.wheel).read_text() == "a wheel"


@pytest.mark.parametrize("tested", ["yes", "-"])
def test_without_a_wheel_before_there_is_nothing_to_refuse(wheels, monkeypatch, tested):
    row = wheels.Row(wheels.Pair("3.12", "2.12.1"))
    earlier = None if tested == "yes" else wheels.Row(wheels.Pair("3.12", "2.11.0"), tested=tested)
    ran = commands(wheels, monkeypatch, row, earlier)
    assert not any("refuses" in words for words in ran) and (row.tested, row.refuses) == ("yes", "-")


def test_a_wheel_that_does_not_refuse_is_in_the_table_as_not_refused(wheels, monkeypatch):
    row = wheels.Row(wheels.Pair("3.12", "2.12.1"))
    earlier = wheels.Row(wheels.Pair("3.12", "2.11.0"), wheel=EARLIER, tested="yes")
    with pytest.raises(wheels.StepFailed, match=r"^its refusal: exit status 1"):
        commands(wheels, monkeypatch, row, earlier, failing="its refusal")
    assert (row.tested, row.refuses) == ("yes", "-")


def test_the_table_has_a_line_for_each_pair_under_its_head(wheels):
    rows = [
        wheels.Row(wheels.Pair("3.12", "2.11.0"), EARLIER, "cpu, cu130", "yes", minutes=4.26),
        wheels.Row(wheels.Pair("3.12", "2.12.1"), "w.whl", "cpu", "yes", "2.11.0", 12.0),
        wheels.Row(wheels.Pair("3.13", "2.12.1"), problem="the wheel: exit status 1"),
    ]
    lines = wheels.table(rows).splitlines()
    cells = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines]
    assert cells == [
        ["python", "torch", "kernels", "tested", "wheel of this torch refused", "minutes", "wheel"],
        ["3.12", "2.11.0", "cpu, cu130", "yes", "-", "4.3", EARLIER],
        ["3.12", "2.12.1", "cpu", "yes", "2.11.0", "12.0", "w.whl"],
        ["3.13", "2.12.1", "-", "-", "-", "0.0", "-"],
    ]
    starts = [line.rindex(row[-1]) for line, row in zip(lines, cells, strict=True)]
    assert len(set(starts)) == 1


@pytest.fixture
def wheel_check(monkeypatch):
    return load(ROOT / "csrc" / "wheel_check.py", monkeypatch)


REFUSAL = "advflow_ext/_C.so was built for torch 2.11.0 but torch {here} is installed; reinstall it with 'pip'."


@pytest.mark.parametrize(
    ("module", "said", "passes"),
    [
        (None, [REFUSAL], True),
        (None, [], False),  # refused without a word
        (None, [REFUSAL, REFUSAL], False),
        (None, [REFUSAL.replace("2.11.0", "2.12.1")], False),
        (object(), [REFUSAL], False),  # loaded all the same
    ],
)
def test_a_refusal_is_one_sentence_and_no_module(wheel_check, monkeypatch, module, said, passes):
    package = SimpleNamespace(
        _native=SimpleNamespace(module=module),
        advantage_flow_loss=af.reference.advantage_flow_loss,
        reference=af.reference,
    )
    sentences = [sentence.format(here=torch.__version__) for sentence in said]
    monkeypatch.setattr(wheel_check, "imported", lambda: (package, sentences))
    if passes:
        wheel_check.check_refuses("2.11.0")
        return
    with pytest.raises(AssertionError):
        wheel_check.check_refuses("2.11.0")
