"""Published weights: read as they are from safetensors, or converted once from a torch file."""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError
from typing import TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)

_INSIDE = ("model", "module", "state_dict")  # LlamaGen's DDP and DeepSpeed files, Lightning's
_NOT_WEIGHTS = ("freqs_cis", "causal_mask")  # earlier LlamaGen files hold what is computed now


def convert(source: Path, out: Path) -> None:
    """Writes the weights of a torch file as safetensors. No code of the file is run.

    Raises ValueError where the file cannot be read so.
    """
    try:
        held = torch.load(source, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise ValueError(
            f"{str(source)!r} holds more than tensors, and reading that would run code; accepted: a file whose weights "
            f"were saved alone ({' '.join(str(error).split())[:200]})"
        ) from error
    for key in _INSIDE:
        if isinstance(held, dict) and isinstance(held.get(key), dict):
            held = held[key]
            break
    if not isinstance(held, dict) or not all(isinstance(value, Tensor) for value in held.values()):
        raise ValueError(f"{str(source)!r} holds no weights; accepted: a dictionary of tensors, or one below {_INSIDE}")
    # Cloned: safetensors refuses tensors that share memory.
    save_file({key: value.clone().contiguous() for key, value in held.items()}, out)


def load_weights(model: Model, path: Path, part: str = "") -> Model:
    """Gives a model, which may be on the meta device, the weights of a safetensors file, each under its published name.

    `part` is that of the file the model is, such as "transformer." or "first_stage_model." of a Net2NetTransformer.

    Raises ValueError for a file that is not of this model.
    """
    if path.suffix != ".safetensors":
        raise ValueError(f"{str(path)!r} is no safetensors file; accepted: one, which `convert` makes of a torch file")
    state = {key.removeprefix(part): value for key, value in load_file(path).items() if key.startswith(part)}
    # A VQGAN's file has its discriminator below "loss.".
    state = {key: value for key, value in state.items() if key not in _NOT_WEIGHTS and not key.startswith("loss.")}
    try:
        model.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{str(path)!r} is not of this model: {' '.join(str(error).split())[:400]}") from error
    return model
