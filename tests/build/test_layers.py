"""Which room of the package may know of which."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXTENSION, TRAINER, BENCH = ROOT / "advflow_ext", ROOT / "python/advflow", ROOT / "bench"

# A room may import what stands before it, and nothing of its own row.
FLOORS = (  # of advflow_ext
    ("_native", "losses"),
    ("contract",),
    ("reference", "kernels"),
    ("ops", "nn", "testing"),
    ("policies", "patches", "distribution"),
    ("conformance", "info", "integrations"),
    ("bench",),
    ("doctor",),
)
USERS = FLOORS[-3] + FLOORS[-2] + FLOORS[-1]  # of the package, as everybody is


TRAINER_FLOORS = (
    ("settings",),
    ("core", "autoregressive"),
    ("samplers", "world", "shapes"),
    ("algorithms", "ar_world"),
    ("data", "control"),
    ("models", "rewards"),
    ("policies",),
    ("processes",),
    ("run", "serve"),
    ("report", "dry_run"),
    ("cli", "__main__"),
)

BENCH_FLOORS = (
    ("roofline",),
    ("step", "exactness", "learning"),
)


def imported(path: Path) -> set[str]:
    """Full names of what ``path`` imports, at its head or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def rooms_of(path: Path, package: Path) -> set[str]:
    """The rooms of ``package`` that ``path`` imports from; "" is the package's own names."""
    names = {name for name in imported(path) if name.split(".")[0] == package.name}
    rooms = set()
    for name in names:
        room = (*name.split("."), "")[1]
        is_room = (package / room).is_dir() or (package / f"{room}.py").is_file()
        rooms.add(room if room and is_room else "")
    return rooms


def assert_knows_of_those_below(package: Path, floors: tuple[tuple[str, ...], ...], room: str, also: set[str]) -> None:
    home = package / room
    files = sorted(home.rglob("*.py")) if home.is_dir() else [home.with_suffix(".py")]
    assert files
    floor = next(place for place, rooms in enumerate(floors) if room in rooms)
    allowed = {room} | also | {each for rooms in floors[:floor] for each in rooms}
    for path in files:
        assert rooms_of(path, package) <= allowed, path


def rooms(package: Path) -> set[str]:
    found = {path.stem for path in package.iterdir() if path.is_dir() or path.suffix == ".py"}
    return found - {"__init__", "__pycache__", "configs", "results"}


@pytest.mark.parametrize("room", [room for floor in FLOORS for room in floor])
def test_a_room_knows_of_those_below_it_alone(room: str) -> None:
    assert_knows_of_those_below(EXTENSION, FLOORS, room, {""} if room in USERS else set())


@pytest.mark.parametrize("room", [room for floor in TRAINER_FLOORS for room in floor])
def test_a_room_of_the_trainer_too(room: str) -> None:
    also = {"cli"} if room == "__main__" else set()
    assert_knows_of_those_below(TRAINER, TRAINER_FLOORS, room, also)


@pytest.mark.parametrize("room", [room for floor in BENCH_FLOORS for room in floor])
def test_a_room_of_the_bench_too(room: str) -> None:
    assert_knows_of_those_below(BENCH, BENCH_FLOORS, room, set())


def test_the_bench_asks_the_trainer_past_its_command_line() -> None:
    callers = [path for path in BENCH.rglob("*.py") for name in imported(path) if name.startswith("advflow.cli")]
    assert callers == []


def test_a_model_family_is_named_in_its_own_file_alone() -> None:
    """And in the list of names, and where the embedded world's pipeline is made."""
    allowed = {
        "models/sd3.py",
        "models/sd3_structure.py",
        "settings/registry.py",
        "settings/model.py",
        "world/pretrain.py",
    }
    names = re.compile(r"StableDiffusion3|SD3|\bsd3\b|apply_to_sd3")
    found = {str(path.relative_to(TRAINER)) for path in TRAINER.rglob("*.py") if names.search(path.read_text())}
    assert found <= allowed and "models/sd3.py" in found


def test_all_settings_at_once_are_for_those_who_put_a_run_together() -> None:
    """A reward, an algorithm, a process or a policy is handed its own section."""
    whole = ("advflow.settings.config.TrainConfig", "advflow.settings.config.config_class")
    users = {path for path in TRAINER.rglob("*.py") if imported(path).intersection(whole)}
    assert {path.relative_to(TRAINER).parts[0] for path in users} == {"settings", "run", "report", "dry_run"}


def test_every_room_has_its_floor() -> None:
    assert rooms(EXTENSION) == {room for floor in FLOORS for room in floor}
    assert rooms(TRAINER) == {room for floor in TRAINER_FLOORS for room in floor}
    assert rooms(BENCH) == {room for floor in BENCH_FLOORS for room in floor}


@pytest.mark.parametrize("package", ["advflow_ext", "python/advflow", "bench"])
def test_no_circle_of_files(package: str) -> None:
    home = ROOT / package
    files = {
        ".".join(path.relative_to(home.parent).with_suffix("").parts): path
        for path in home.rglob("*.py")
        if path.name != "__init__.py"
    }
    used = {name: set(imported(path)) for name, path in files.items()}
    arrows = {
        name: {each for each in files if each != name and any((f"{i}.").startswith(f"{each}.") for i in used[name])}
        for name in files
    }
    while arrows:
        free = {name for name, to in arrows.items() if not to & arrows.keys()}
        assert free, f"a circle among {sorted(arrows)}"
        arrows = {name: to for name, to in arrows.items() if name not in free}
