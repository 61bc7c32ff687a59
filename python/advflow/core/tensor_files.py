"""Files of tensors: safetensors, whose failures to write are told as those of other files."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


@contextmanager
def as_os_errors(path: Path) -> Iterator[None]:
    """Raises OSError, as for any other file, where safetensors cannot write below `path`."""
    try:
        yield
    except SafetensorError as error:
        found = re.search(r"\(os error (\d+)\)", str(error))
        if found is None:
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number), str(path)) from error
