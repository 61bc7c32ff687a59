"""What the doctor says of trainers: by trying, and without touching what is patched here."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from types import ModuleType

import pytest

from advflow_ext import integrations
from advflow_ext.doctor import trainers
from advflow_ext.doctor.advice import of_the_trainers
from advflow_ext.integrations._patching import Patch, Replacement

STAND_INS = {  # of integrations, by name: what install() does
    "one": "print('patched')",
    "two": "raise ImportError('two is not to be patched: two cannot be imported')",
    "three": "raise RuntimeError('three.step is (self, x); accepted is (self, x, y) of abc1234.')",
}


@pytest.fixture
def stand_ins(tmp_path, monkeypatch):
    for name, body in STAND_INS.items():
        (tmp_path / f"{name}.py").write_text(
            f"def install(exact=False):\n    {body}\ndef uninstall():\n    print('{name} is as it was')\n"
        )
    monkeypatch.setattr(integrations, "__path__", [str(tmp_path)])
    yield
    for name in STAND_INS:
        sys.modules.pop(f"{integrations.__name__}.{name}", None)


def test_a_trainer_is_tried_by_its_install(stand_ins, capsys):
    found = {each.name: each for each in trainers.attempts(["one", "three", "two"])}
    assert {name: each.state for name, each in found.items()} == {"one": "known", "two": "absent", "three": "refused"}
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err == "patched\none is as it was\n"
    assert found["two"].sentence == "two is not to be patched: two cannot be imported"
    (sentence,) = of_the_trainers({"versions": {"diffusers": None}}, list(found.values()))
    assert sentence == (
        "advflow_ext.integrations.three.install() refuses what is here: "
        "three.step is (self, x); accepted is (self, x, y) of abc1234."
    )


def test_the_trainers_are_the_modules_with_an_install():
    """Whatever else lies beside them would end the process that tries it."""
    names = [module.name for module in pkgutil.iter_modules(integrations.__path__)]
    modules = {name: importlib.import_module(f"{integrations.__name__}.{name}") for name in names}
    assert list(integrations.TRAINERS) == sorted(name for name in names if hasattr(modules[name], "install"))


def test_every_trainer_is_tried_and_none_is_here():
    found = trainers.Attempt().found()
    assert [each.name for each in found] == list(integrations.TRAINERS)
    assert {each.state for each in found} == {"absent"}, found
    assert all(each.sentence for each in found)


def test_what_is_patched_here_is_said_and_left_alone(monkeypatch):
    owner = ModuleType("a_trainer")
    exec("def step(x):\n    return x", vars(owner))
    monkeypatch.setitem(sys.modules, "a_trainer", owner)
    module = ModuleType(f"{integrations.__name__}.a_trainer")
    module._patch = Patch("a_trainer")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(integrations, "TRAINERS", ("a_trainer",))
    assert not trainers.is_patched("a_trainer") and not trainers.is_patched("nothing_of_the_kind")

    def ours(x: int) -> int:
        return x + 1

    module._patch.replace([Replacement(owner, "step", ours)])  # type: ignore[attr-defined, arg-type]
    attempt = trainers.Attempt()
    assert attempt.process is None
    assert attempt.found() == [trainers.Trainer("a_trainer", "patched")]
    assert owner.step(1) == 2
    module._patch.restore()  # type: ignore[attr-defined]
    assert not trainers.is_patched("a_trainer")


def test_a_process_that_says_nothing_leaves_a_sentence(monkeypatch):
    monkeypatch.setattr(integrations, "TRAINERS", ("no_such_trainer",))  # its process ends with an exception
    (found,) = trainers.Attempt().found()
    assert found.state == "unknown" and "had not ended after 60 s, or failed" in found.sentence


def test_a_trainer_that_does_not_end_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(integrations, "TRAINERS", ("one",))
    monkeypatch.setattr(trainers, "SECONDS", 0.2)
    attempt = trainers.Attempt()
    (found,) = attempt.found()  # importing the package takes longer
    assert found.state == "unknown"
    assert attempt.process is not None and attempt.process.returncode is not None


def test_a_checkout_of_another_version_is_found_from_inside_of_it(tmp_path, monkeypatch):
    package = tmp_path / "flow_grpo" / "diffusers_patch"
    package.mkdir(parents=True)
    (package / "sd3_sde_with_logprob.py").write_text("def sde_step_with_logprob(scheduler, v):\n    return v\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(integrations, "TRAINERS", ("flow_grpo", "unirl"))
    refused, absent = trainers.Attempt().found()
    assert refused.state == "refused" and "sde_step_with_logprob is (scheduler, v); accepted is " in refused.sentence
    assert absent == trainers.Trainer("unirl", "absent", "No module named 'unirl'")
