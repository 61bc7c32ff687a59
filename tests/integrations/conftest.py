"""What every test of the integrations shares."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="module")
def what_was_there_before() -> Iterator[None]:
    """Set aside: an install looks through every object for holders of what it replaces, which takes a second of all
    those that torch and diffusers have made. The trainers that a test patches are made after this.
    """
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
