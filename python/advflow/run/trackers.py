"""Services that follow a run: Weights & Biases and trackio, which share their calls."""

from __future__ import annotations

import importlib
import importlib.util
import json
import secrets
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from PIL import Image

from advflow.core.files import write_atomically
from advflow.settings.numbers import flatten
from advflow.settings.tracking import TrackingConfig

_IDENTITY = "tracking.json"


def check_trackers(config: TrackingConfig) -> None:
    """Raises ValueError where a package is missing, before anything is loaded."""
    for name in config.to:
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"tracking.to names {name!r}, which is not installed: pip install {name}")


class Trackers:
    """All of a run's. What one of them raises while the run goes is said once, and the run goes on without it."""

    def __init__(self, config: TrackingConfig, folder: Path, settings: Mapping[str, Any]) -> None:
        self._modules: dict[str, ModuleType] = {name: importlib.import_module(name) for name in config.to}
        self._runs: dict[str, Any] = {}
        for name, module in self._modules.items():
            # A run that goes on is the same one there: by its folder for trackio, by a number of its own for wandb.
            own = {"id": _identity(folder), "dir": str(folder)} if name == "wandb" else {}
            given = own | {"name": folder.resolve().name, "resume": "allow"} | dict(config.args.get(name, {}))
            self._runs[name] = module.init(project=config.project, config=flatten(dict(settings)), **given)

    def log(self, values: Mapping[str, Any], step: int) -> None:
        known = {name: value for name, value in values.items() if isinstance(value, int | float)}
        self._each(lambda name: self._runs[name].log(known, step=step))

    def picture(self, title: str, picture: Image.Image, step: int) -> None:
        self._each(lambda name: self._runs[name].log({title: self._modules[name].Image(picture)}, step=step))

    def close(self) -> None:
        self._each(lambda name: self._runs[name].finish())

    def _each(self, call: Callable[[str], object]) -> None:
        for name in list(self._runs):
            try:
                call(name)
            except Exception as error:  # whatever a service, its client or its network does, training is worth more
                del self._runs[name]
                warnings.warn(f"{name} is told no more of this run: {error!r}", UserWarning, stacklevel=3)


def _identity(folder: Path) -> str:
    """A number of the run, which stays."""
    path = folder / _IDENTITY
    if not path.is_file():
        write_atomically(path, json.dumps({"id": secrets.token_hex(8)}) + "\n")
    found: str = json.loads(path.read_text(encoding="utf-8"))["id"]
    return found
