"""Builds wheels and tests them, for pairs of Python and torch: ``make wheels PAIRS="3.12:2.11.0 3.13:2.15.0"``.

    the source archive, into dist/
    for each pair, in a folder of its own that is deleted afterwards ($TMPDIR says where; several GB):
        a virtual environment with that torch alone
        the wheel, from the archive, by pip's isolated build beside that torch; into dist/
        the wheel installed there, and wheel_check.py run on it
        the wheel of the same Python for the torch before it: it must refuse this one

Without PAIRS: every combination of PYTHONS and TORCHES whose interpreter is found, on PATH or among pyenv's. Kernels
are as setup.py decides: CUDA's where nvcc is, ADVFLOW_CUDA=0 leaves them out. Where torch comes from is pip's to say
(PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS, ...). What every command printed is in build/wheels.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"
LOGS = ROOT / "build" / "wheels"
CHECK = Path(__file__).with_name("wheel_check.py")

PYTHONS = ("3.11", "3.12", "3.13")
# A module serves one release: the last one of each minor version.
TORCHES = ("2.11.0", "2.12.1", "2.13.0", "2.14.1", "2.15.0")

# Of the interpreter asked for, and able to make environments and to compile extensions. A shim of pyenv may be neither.
PROBE = (
    "import ensurepip, os, sys, sysconfig; "
    "assert os.path.exists(os.path.join(sysconfig.get_path('include'), 'Python.h')); "
    "print('%d.%d' % sys.version_info[:2])"
)


@dataclass(frozen=True, order=True)
class Pair:
    python: str
    torch: str

    def __str__(self) -> str:
        return f"{self.python}:{self.torch}"


@dataclass
class Row:
    """A line of the table at the end; "-" is what was not reached."""

    pair: Pair
    wheel: str = "-"
    kernels: str = "-"
    tested: str = "-"
    refuses: str = "-"
    minutes: float = 0.0
    problem: str = ""


class StepFailed(Exception):
    """Ends a pair, not the run."""


def parse_pairs(words: Iterable[str]) -> list[Pair]:
    """In an order that has each Python's torches behind each other."""
    pairs = set()
    for word in words:
        match = re.fullmatch(r"(3\.\d+):(\d+\.\d+\.\d+)", word)
        if match is None:
            raise SystemExit(f"PAIRS has {word!r}; accepted are Python and torch's full release, such as 3.12:2.11.0.")
        pairs.add(Pair(match[1], match[2]))
    return sorted(
        pairs, key=lambda pair: [[int(part) for part in text.split(".")] for text in (pair.python, pair.torch)]
    )


def find_python(version: str, environment: Mapping[str, str]) -> str | None:
    """The first interpreter of ``version`` that can build: on PATH, else the newest of pyenv's."""
    versions = Path(environment.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    by_age = sorted(versions.glob(f"{version}.*"), key=lambda folder: [int(n) for n in re.findall(r"\d+", folder.name)])
    on_path = shutil.which(f"python{version}", path=environment.get("PATH", ""))
    for candidate in [on_path, *(str(folder / "bin" / "python") for folder in reversed(by_age))]:
        if candidate and answers(candidate) == version:
            return candidate
    return None


def answers(interpreter: str) -> str:
    try:
        return subprocess.run([interpreter, "-c", PROBE], capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def choose(words: Sequence[str], environment: Mapping[str, str]) -> dict[Pair, str]:
    """The pairs to build, each with its interpreter."""
    pairs = parse_pairs(words or (f"{python}:{torch}" for python in PYTHONS for torch in TORCHES))
    interpreters = {version: find_python(version, environment) for version in {pair.python for pair in pairs}}
    missing = sorted(version for version, interpreter in interpreters.items() if interpreter is None)
    if missing and (words or len(missing) == len(interpreters)):
        raise SystemExit(
            f"There is no Python {', '.join(missing)} with venv and Python.h on PATH or among pyenv's versions."
        )
    for version in missing:
        print(f"Python {version} is neither on PATH nor among pyenv's versions: left out.")
    return {pair: interpreter for pair in pairs if (interpreter := interpreters[pair.python])}


def kernels_of(wheel: str, pair: Pair) -> str:
    """What a wheel has kernels for, cpu or cpu and cu130, by its name, which has to be the pair's."""
    tag = "cp" + pair.python.replace(".", "")
    match = re.fullmatch(rf"advflow_ext-[\d.]+\+torch{re.escape(pair.torch)}\.(cpu|cu\d+)-{tag}-{tag}-\w+\.whl", wheel)
    if match is None:
        raise StepFailed(f"{wheel} is no name for Python {pair.python} and torch {pair.torch}")
    return "cpu" if match[1] == "cpu" else f"cpu, {match[1]}"


def child_environment() -> dict[str, str]:
    """Nothing of the environment this runs in, and the commit, which an unpacked archive cannot tell."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    repository = subprocess.run(["git", "rev-parse", "--absolute-git-dir"], cwd=ROOT, capture_output=True, text=True)
    if repository.returncode == 0:
        environment["GIT_DIR"] = repository.stdout.strip()
    return environment


class Steps:
    """Runs what one pair takes, with a line for each step and everything else in a file."""

    def __init__(self, name: str, position: str) -> None:
        self.position, self.name = position, name
        self.log = LOGS / f"{name.replace(':', '-')}.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.log.write_text("")

    def run(self, what: str, *command: str | Path, cwd: Path) -> None:
        print(f"{self.position} {self.name}: {what}", flush=True)
        with self.log.open("a") as log:
            print(f"\n$ {' '.join(map(str, command))}", file=log, flush=True)
            result = subprocess.run(
                list(map(str, command)), cwd=cwd, env=child_environment(), stdout=log, stderr=subprocess.STDOUT
            )
        if result.returncode:
            tail = self.log.read_text().splitlines()[-15:]
            print("\n".join(f"    {line}" for line in tail), flush=True)
            raise StepFailed(f"{what}: exit status {result.returncode}, see {self.log.relative_to(ROOT)}")


def make_archive(interpreter: str) -> Path:
    """The source archive: a wheel made from it is made from nothing else that lies in the tree."""
    with tempfile.TemporaryDirectory(prefix="advflow-archive-") as name:
        work = Path(name)
        steps = Steps("sdist", "[0]")
        requires = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
        steps.run("an environment for it", interpreter, "-m", "venv", work / "venv", cwd=work)
        python = work / "venv" / "bin" / "python"
        steps.run("its build backend", python, "-m", "pip", "install", "-q", *requires, cwd=work)
        steps.run("the source archive", python, "setup.py", "-q", "sdist", "-d", work / "dist", cwd=ROOT)
        (archive,) = (work / "dist").glob("*.tar.gz")
        return Path(shutil.copy(archive, DIST))


def build_and_test(row: Row, interpreter: str, archive: Path, earlier: Row | None, position: str) -> None:
    pair, steps = row.pair, Steps(str(row.pair), position)
    with tempfile.TemporaryDirectory(prefix="advflow-wheel-") as name:
        work = Path(name)
        python = work / "venv" / "bin" / "python"
        pip = (python, "-m", "pip")
        steps.run("an environment", interpreter, "-m", "venv", work / "venv", cwd=work)
        steps.run(f"torch {pair.torch}", *pip, "install", "-q", f"torch=={pair.torch}", cwd=work)
        steps.run("the wheel", *pip, "wheel", "-v", "--no-deps", "-w", work / "dist", archive, cwd=work)
        (wheel,) = (work / "dist").iterdir()
        row.kernels = kernels_of(wheel.name, pair)
        steps.run("its installation", *pip, "install", wheel, cwd=work)
        steps.run("its tests", python, "-I", CHECK, "serves", pair.torch, cwd=work)
        steps.run("its report", python, "-I", "-m", "advflow_ext.info", cwd=work)
        row.tested, row.wheel = "yes", Path(shutil.copy(wheel, DIST)).name
        if earlier is not None and earlier.tested == "yes":
            other = DIST / earlier.wheel
            what = f"the wheel for torch {earlier.pair.torch} beside this torch"
            steps.run(what, *pip, "install", "-q", "--no-deps", "--force-reinstall", other, cwd=work)
            steps.run("its refusal", python, "-I", CHECK, "refuses", earlier.pair.torch, cwd=work)
            row.refuses = earlier.pair.torch


def table(rows: Sequence[Row]) -> str:
    head = ("python", "torch", "kernels", "tested", "wheel of this torch refused", "minutes", "wheel")
    lines = [head] + [
        (row.pair.python, row.pair.torch, row.kernels, row.tested, row.refuses, f"{row.minutes:.1f}", row.wheel)
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def main(words: Sequence[str]) -> int:
    chosen = choose(words, os.environ)
    DIST.mkdir(exist_ok=True)
    print(f"{len(chosen)} wheel(s) into {DIST.relative_to(ROOT)}/: {', '.join(map(str, chosen))}", flush=True)
    try:
        archive = make_archive(next(iter(chosen.values())))
    except StepFailed as failure:
        raise SystemExit(str(failure)) from None
    rows = [Row(pair) for pair in chosen]
    for number, (before, row) in enumerate(itertools.pairwise([None, *rows]), start=1):
        assert row is not None
        earlier = before if before is not None and before.pair.python == row.pair.python else None
        start = time.monotonic()
        try:
            build_and_test(row, chosen[row.pair], archive, earlier, f"[{number}/{len(rows)}]")
        except StepFailed as failure:
            row.problem = str(failure)
        row.minutes = (time.monotonic() - start) / 60
    failed = [row for row in rows if row.problem]
    print("\n" + table(rows))
    for row in failed:
        print(f"{row.pair} failed: {row.problem}.")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
