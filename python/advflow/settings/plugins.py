"""Modules that add to what a run chooses by name."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterable


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


def look_in_current_folder() -> None:
    """`python -m` finds modules in the current folder; a console script has to be told."""
    folder = os.getcwd()
    if not {"", folder} & set(sys.path):
        sys.path.insert(0, folder)
