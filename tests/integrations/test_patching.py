"""What every integration shares: a trainer's function is replaced wherever it is looked up, or nowhere."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch

from advflow_ext.integrations import _patching
from advflow_ext.integrations._patching import Patch, Replacement

SOURCE = """
def step(self, x, level=0.7):
    return "theirs"

class Scheduler:
    def step(self, x):
        return "theirs"

    @staticmethod
    def density(x):
        return "theirs"
"""


def ours(self: object, x: object, level: float = 0.7) -> str:
    return "ours"


def our_method(self: object, x: object) -> str:
    return "ours"


def our_density(x: object) -> str:
    return "ours"


@pytest.fixture
def make() -> Iterator[Callable[[str, str], ModuleType]]:
    """Modules that are imported for one test."""
    made = []

    def module_of(name: str, source: str) -> ModuleType:
        module = sys.modules[name] = ModuleType(name)
        made.append(name)
        exec(source, module.__dict__)
        return module

    yield module_of
    for name in made:
        del sys.modules[name]


@pytest.fixture
def trainer(make: Callable[[str, str], ModuleType]) -> ModuleType:
    return make("a_trainer", SOURCE)


@pytest.fixture
def patch() -> Iterator[Patch]:
    patch = Patch("a trainer")
    yield patch
    patch.restore()


def test_it_is_replaced_wherever_it_was_imported_by_value(trainer, make, patch):
    pipeline = make("a_pipeline", "from a_trainer import step as sde_step, Scheduler\nstep = sde_step")
    script = {"__name__": "__main__", "step": trainer.step}  # as runpy leaves it, in no module
    exec("def train(): return step(None, None)", script)
    theirs = trainer.step
    patch.replace([Replacement(trainer, "step", ours)])
    assert patch.installed
    places = [trainer.step, pipeline.sde_step, pipeline.step, script["step"]]
    assert [place(None, None) for place in places] == ["ours"] * 4 and script["train"]() == "ours"

    later = make("a_later_one", "from a_trainer import step")
    assert later.step(None, None) == "ours"
    patch.restore()
    places = [trainer.step, pipeline.sde_step, pipeline.step, script["step"], later.step]
    assert {id(place) for place in places} == {id(theirs)} and not patch.installed
    assert ours(None, None) == "ours"  # the template of what was put there is nobody's


def test_a_method_and_a_static_one(trainer, make, patch):
    copied = make("a_copy", "from a_trainer import Scheduler\ndensity, step = Scheduler.density, Scheduler.step")
    method, static, density = vars(trainer.Scheduler)["step"], vars(trainer.Scheduler)["density"], copied.density
    patch.replace(
        [Replacement(trainer.Scheduler, "step", our_method), Replacement(trainer.Scheduler, "density", our_density)]
    )
    scheduler = trainer.Scheduler()
    assert scheduler.step(None) == scheduler.density(None) == "ours"
    assert copied.step(None, None) == copied.density(None) == "ours"
    patch.restore()
    assert vars(trainer.Scheduler)["step"] is method is copied.step
    assert vars(trainer.Scheduler)["density"] is static and trainer.Scheduler.density is density is copied.density


def test_twice_is_once(trainer, patch):
    theirs = trainer.step
    patch.replace([Replacement(trainer, "step", ours)])
    first = trainer.step
    patch.replace([Replacement(trainer, "step", ours)])
    assert trainer.step is first and patch.replaces(trainer, "step")
    patch.restore()
    patch.restore()
    assert trainer.step is theirs


# A trainer that holds its function where no assignment of ours reaches it, and the words for that place.
LATE = {
    "import functools; fast = functools.partial(step, level=0)": "a partial",
    "import functools; kept = functools.lru_cache(step)": "a _lru_cache_wrapper, a dict",
    "def train(x, sde=step): pass": "a default or attribute of train",
    "def made(f):\n    def train(): f()\n    return train\ntrain = made(step)": "the closure of made.<locals>.train",
    "steps = {'sde': step}": "a dict",
    "steps = [step]": "a list",
    "class Trainer:\n    sde = step": "the class Trainer",
    "class Trainer: pass\ntrainer = Trainer(); trainer.sde = step": "a Trainer",
    "def draws(f):\n    yield f\ndrawn = draws(step); next(drawn)": "a generator",
}


@pytest.mark.parametrize(("line", "words"), LATE.items(), ids=LATE.values())
def test_where_it_is_too_late_nothing_is_replaced(line, words, trainer, make, patch):
    pipeline = make("a_pipeline", f"from a_trainer import step\n{line}")
    theirs, method = trainer.step, trainer.Scheduler.step
    with pytest.raises(RuntimeError) as error:
        patch.replace([Replacement(trainer.Scheduler, "step", our_method), Replacement(trainer, "step", ours)])
    assert str(error.value) == (
        f"a_trainer.step is held by {words}, out of reach, and nothing was replaced; accepted is an install() for a "
        "trainer that runs first, before that is made."
    )
    assert trainer.step is theirs is pipeline.step and trainer.Scheduler.step is method and not patch.installed


@pytest.mark.parametrize(("line", "words"), LATE.items(), ids=LATE.values())
def test_what_kept_a_replacement_is_said(line, words, trainer, make, patch):
    patch.replace([Replacement(trainer, "step", ours)])
    pipeline = make("a_pipeline", f"from a_trainer import step\n{line}")
    with pytest.warns(RuntimeWarning, match=f"is a trainer's own again, but {words}, made in between, keeps"):
        patch.restore()
    assert pipeline.step is trainer.step and trainer.step(None, None) == "theirs"


def test_a_bound_method_is_out_of_reach(trainer, make, patch):
    make("a_pipeline", "from a_trainer import Scheduler\nstep = Scheduler().step")
    with pytest.raises(RuntimeError, match="Scheduler.step is held by a method, out of reach"):
        patch.replace([Replacement(trainer.Scheduler, "step", our_method)])


def test_an_ended_frame_holds_nothing(trainer, patch):
    def failing(step):
        raise KeyError(step.__name__)

    try:
        failing(trainer.step)
    except KeyError as error:
        patch.replace([Replacement(trainer, "step", ours)])
        assert error.__traceback__ is not None and trainer.step(None, None) == "ours"


def test_signatures_are_compared_without_annotations(trainer):
    def step(self: object, x: int, level: float = 0.7) -> str:
        return ""

    accepted = {"(self, x, level=0.7)": "someone/trainer at abc1234", "(x)": "someone/trainer at 1234abc"}
    trainer.step = step
    assert _patching.require_signature(trainer, "step", accepted) == "(self, x, level=0.7)"

    trainer.step = lambda self, x, level=0.8, *, exact=False: None
    with pytest.raises(RuntimeError) as error:
        _patching.require_signature(trainer, "step", accepted)
    assert str(error.value) == (
        "a_trainer.step is (self, x, level=0.8, *, exact=False); accepted is (self, x, level=0.7) of someone/trainer "
        "at abc1234; (x) of someone/trainer at 1234abc."
    )
    trainer.step = 3
    with pytest.raises(RuntimeError, match=r"^a_trainer.step is 3; accepted is \(self, x, level=0.7\) of someone"):
        _patching.require_signature(trainer, "step", accepted)


def test_what_a_class_inherits_is_not_its_own(trainer):
    heir = type("Heir", (trainer.Scheduler,), {"__module__": "a_trainer"})
    with pytest.raises(RuntimeError, match=r"^a_trainer.Heir.step does not exist; accepted is that of abc\.$"):
        _patching.require_signature(heir, "step", {"(self, x)": "abc"})
    assert _patching.require_signature(trainer.Scheduler, "density", {"(x)": "someone at abc"}) == "(x)"


def test_a_trainer_that_is_not_there():
    with pytest.raises(ImportError) as error:
        _patching.find_module("a trainer", "no_trainer.step")
    assert str(error.value) == (
        "a trainer is not to be patched: no_trainer.step cannot be imported (No module named 'no_trainer'); accepted "
        "is a Python that finds it, such as one started in a trainer's checkout."
    )
    assert _patching.find_module("a trainer", "advflow_ext.integrations._patching") is _patching


def test_a_function_that_computes_something_else_is_refused():
    def require(theirs: list[float], ours: list[float]) -> None:
        _patching.require_agreement("a.step", "x/y at abc", {"mean": (torch.tensor(theirs), torch.tensor(ours))}, 1e-6)

    require([1.0, 0.0], [1.0, 9e-7])
    with pytest.raises(RuntimeError) as error:
        require([4.0, 0.0], [4.0, 1e-2])
    assert str(error.value) == (
        "a.step computes another mean than that of x/y at abc, by 0.0025 of its largest element; accepted is the "
        "function of those commits."
    )
    for wrong in ([torch.nan, 1.0], [torch.inf, 1.0]):
        with pytest.raises(RuntimeError, match="computes another mean"):
            require([1.0, 1.0], wrong)
    with pytest.raises(RuntimeError, match=r"^a.step returns mean \[2\], ours \[1\]; accepted is that of"):
        require([1.0, 1.0], [1.0])


def test_one_process_of_a_launcher_speaks(monkeypatch, capsys):
    _patching.announce("a trainer", "patched.")
    monkeypatch.setenv("RANK", "3")
    _patching.announce("a trainer", "patched.")
    assert capsys.readouterr().out == "advflow_ext in a trainer: patched.\n"


def test_no_trainer_is_imported_before_install():
    listing = (
        "import sys, pkgutil, torch; before = set(sys.modules)\n"
        "import advflow_ext, advflow_ext.integrations as home\n"
        "for each in pkgutil.iter_modules(home.__path__): __import__(f'{home.__name__}.{each.name}')\n"
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before})"
    )
    result = subprocess.run([sys.executable, "-c", listing], capture_output=True, text=True, check=True)
    found = set(result.stdout.split())
    heavy = {"diffusers", "fastvideo", "flow_factory", "flow_grpo", "transformers", "unirl", "verl", "verl_omni"}
    assert "advflow_ext" in found and not heavy & found
