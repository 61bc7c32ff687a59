"""Whether what a folder or a name on a model hub stands for is on this machine. Nothing is asked of any network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, and in no __all__

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


def how_to_get(name: str, small: bool = False) -> str:
    """The end of a sentence about what is not there, of which perhaps only the `small` files are wanted."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return "no such folder is here"
    only = " --include '*.json' --include '*.txt'" if small else ""
    return f"hf download {name}{only}, where the hub can be reached"
