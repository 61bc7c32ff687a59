"""Modules that add to what a run chooses by name, and which of them a run may have imported."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from advflow.settings.yaml_files import CONFIG


def load_plugins(names: Iterable[str]) -> None:
    """Imports each module, looked for in the current folder first. Raises ValueError where there is none.

    What a module raises is its own, and passes.
    """
    look_in_current_folder()
    for name in names:
        if not isinstance(name, str) or not all(part.isidentifier() for part in name.split(".")):
            raise ValueError(f"plugins holds {name!r}; accepted: modules by their names, as in an import")
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise  # the module is there; one that it imports is not
            raise ValueError(f"plugins holds {name!r}, and there is no module {error.name!r}") from error


def refuse_code_of(run: Path, modules: Iterable[str]) -> None:
    """Raises ValueError for a module that would be imported from the folder of a run, whose config names it.

    A run that somebody else has made may name code, but only code that is here already: it does not bring its own.
    """
    look_in_current_folder()
    home = run.resolve()
    for module in modules:
        for entry in sys.path:
            place = Path(entry, *module.split("."))
            if any(
                found.resolve().is_relative_to(home)
                for found in (place, *place.parent.glob(f"{place.name}.*"))
                if found.exists()
            ):
                raise ValueError(
                    f"{run / CONFIG} names the module {module!r}, which lies in the run's own folder; code that comes "
                    "with a run is not imported: accepted is a module that is installed or in another current folder"
                )


def look_in_current_folder() -> None:
    """`python -m` finds modules in the current folder; a console script has to be told."""
    folder = os.getcwd()
    if not {"", folder} & set(sys.path):
        sys.path.insert(0, folder)
