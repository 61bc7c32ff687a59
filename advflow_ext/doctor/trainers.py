"""Which trainers are here, and whether ``advflow_ext.integrations`` takes them: tried in a process of its own."""

from __future__ import annotations

import contextlib
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from advflow_ext import integrations
from advflow_ext.integrations._patching import Patch

SECONDS = 60  # a trainer's own imports take most of it


@dataclass(frozen=True)
class Trainer:
    name: str
    state: str  # of the keys of STATES
    sentence: str = ""  # why, where install() did not work


STATES = {
    "patched": "patched in this process",
    "known": "here, and install() takes it",
    "refused": "here, and install() refuses it",
    "absent": "cannot be imported here",
    "unknown": "could not be tried",
}


def is_patched(name: str) -> bool:
    """In this process, as where a notebook asks."""
    module = sys.modules.get(f"{integrations.__name__}.{name}")
    return any(isinstance(value, Patch) and value.installed for value in vars(module or object).values())


class Attempt:
    """``install()`` of each trainer, going on in another process while this one does something else."""

    def __init__(self) -> None:
        self.patched = [name for name in integrations.TRAINERS if is_patched(name)]
        self.asked = [name for name in integrations.TRAINERS if name not in self.patched]
        self.process: subprocess.Popen[str] | None = None
        if self.asked:
            command = [sys.executable, "-W", "ignore", "-m", __name__, *self.asked]
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    def found(self) -> list[Trainer]:
        said = "" if self.process is None else self._said(self.process)
        lines = (line for line in said.splitlines() if line.startswith('{"name"'))
        tried = {trainer.name: trainer for trainer in (Trainer(**json.loads(line)) for line in lines)}
        for name in self.asked:
            tried.setdefault(name, Trainer(name, "unknown", f"its import had not ended after {SECONDS} s, or failed"))
        return [Trainer(name, "patched") if name in self.patched else tried[name] for name in integrations.TRAINERS]

    def _said(self, process: subprocess.Popen[str]) -> str:
        try:
            return process.communicate(timeout=SECONDS)[0]
        except subprocess.TimeoutExpired:
            process.kill()
            return process.communicate()[0]


def attempts(asked: list[str]) -> Iterator[Trainer]:
    for name in asked:
        trainer = importlib.import_module(f"{integrations.__name__}.{name}")
        with contextlib.redirect_stdout(sys.stderr):  # trainers print
            yield attempt(name, trainer.install, trainer.uninstall)


def attempt(name: str, install: object, uninstall: object) -> Trainer:
    assert callable(install) and callable(uninstall)
    try:
        install()
    except ImportError as error:
        return Trainer(name, "absent", str(error.__cause__ or error))
    except Exception as error:
        return Trainer(name, "refused", str(error))
    uninstall()
    return Trainer(name, "known")


if __name__ == "__main__":
    for trainer in attempts(sys.argv[1:]):
        print(json.dumps(asdict(trainer)), file=sys.__stdout__, flush=True)
