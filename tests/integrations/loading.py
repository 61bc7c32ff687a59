"""The trainers that the tests run on: our stand-ins, and the real ones where `make test-peers` says where they lie."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

import pytest

PEERS = "PEERS"  # a folder with a checkout of each trainer, under any name


def stand_in(monkeypatch: pytest.MonkeyPatch, modules: Mapping[str, Sequence[type]]) -> None:
    """Makes ``modules`` importable for one test, under the names of the real ones."""
    for name, contents in modules.items():
        module = ModuleType(name)
        for each in contents:
            each.__module__ = name
            setattr(module, each.__name__, each)
        monkeypatch.setitem(sys.modules, name, module)


def real(monkeypatch: pytest.MonkeyPatch, marker: str, *, without_init: Sequence[str] = ()) -> None:
    """Makes the checkout with the file ``marker`` importable, with empty packages for those in ``without_init``.

    A package whose __init__ needs a rollout engine, of which the functions under test know nothing, is one of these.
    """
    folder = os.environ.get(PEERS)
    if not folder:
        pytest.skip(f"{PEERS} names no folder with the trainers' checkouts")
    found = [path for path in sorted(Path(folder).iterdir()) if (path / marker).is_file()]
    if not found:
        pytest.skip(f"no checkout in {PEERS} has {marker}")
    root = found[0] / "src" if marker.startswith("src/") else found[0]
    monkeypatch.syspath_prepend(str(root))
    for name in without_init:
        if name not in sys.modules:
            sys.modules[name] = package = ModuleType(name)
            package.__path__ = [str(root.joinpath(*name.split(".")))]
