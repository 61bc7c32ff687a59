"""Which room of the package may know of which."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# A room may import what stands before it, and nothing of its own row.
FLOORS = (
    ("_native", "losses"),
    ("contract",),
    ("reference", "kernels"),
    ("ops", "nn", "testing"),
    ("policies", "patches"),
    ("conformance", "info"),
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


def rooms_of(path: Path, package: str) -> set[str]:
    """The rooms of ``package`` that ``path`` imports from; "" is the package's own names."""
    names = {name for name in imported(path) if name.split(".")[0] == package}
    rooms = set()
    for name in names:
        room = (*name.split("."), "")[1]
        is_room = (ROOT / package / room).is_dir() or (ROOT / package / f"{room}.py").is_file()
        rooms.add(room if room and is_room else "")
    return rooms


@pytest.mark.parametrize("room", [room for floor in FLOORS for room in floor])
def test_a_room_knows_of_those_below_it_alone(room: str) -> None:
    home = ROOT / "advflow_ext" / room
    files = sorted(home.rglob("*.py")) if home.is_dir() else [home.with_suffix(".py")]
    assert files
    floor = next(place for place, rooms in enumerate(FLOORS) if room in rooms)
    allowed = {room} | {each for rooms in FLOORS[:floor] for each in rooms}
    if room in FLOORS[-1]:
        allowed.add("")  # the public names themselves
    for path in files:
        assert rooms_of(path, "advflow_ext") <= allowed, path


def test_every_room_has_its_floor() -> None:
    rooms = {path.stem for path in (ROOT / "advflow_ext").iterdir() if path.is_dir() or path.suffix == ".py"}
    assert rooms - {"__init__", "__pycache__"} == {room for floor in FLOORS for room in floor}


def test_no_circle_of_files() -> None:
    files = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path
        for path in (ROOT / "advflow_ext").rglob("*.py")
        if path.name != "__init__.py"
    }
    arrows = {
        name: {each for each in files if each != name and any((f"{i}.").startswith(f"{each}.") for i in imported(path))}
        for name, path in files.items()
    }
    while arrows:
        free = {name for name, to in arrows.items() if not to & arrows.keys()}
        assert free, f"a circle among {sorted(arrows)}"
        arrows = {name: to for name, to in arrows.items() if name not in free}
