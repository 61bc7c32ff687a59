"""Whether what a folder or a name on a model hub stands for is on this machine. Nothing is asked of any network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""Any of which transformers loads a model from."""


def has_one_of(name: str, files: Sequence[str]) -> bool:
    """Whether the folder `name`, or what was downloaded of the repository of that name, has one of `files`."""
    if Path(name).is_dir():
        return any((Path(name) / file).is_file() for file in files)
    try:
        return any(isinstance(try_to_load_from_cache(name, file), str) for file in files)
    except ValueError:  # no name that a hub could have
        return False


def is_repository(name: str) -> bool:
    """Whether `name` may be that of a repository: OWNER/NAME, and nothing of that name lies here."""
    owner, slash, rest = name.partition("/")
    return bool(owner and slash and rest) and "/" not in rest and owner[0] not in ".~" and not Path(name).exists()


def how_to_get(name: str) -> str:
    """The end of a sentence about what is not there."""
    return f"where the hub can be reached: hf download {name}" if is_repository(name) else "no such folder is here"
