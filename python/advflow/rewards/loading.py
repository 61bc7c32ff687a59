"""What rewards load: models by name, weights from files, packages that not everybody has."""

from __future__ import annotations

import importlib
import importlib.util
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from advflow.core.hub import WEIGHTS, has_one_of, how_to_get
from advflow.rewards import WrongArgument


def scoring_device() -> str:
    """Where rewards compute: this process's GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def pretrained(kind: Any, argument: str, name: str) -> Any:
    """What `kind`, a class of transformers, loads from a folder or the hub. Raises WrongArgument where it cannot."""
    try:
        return kind.from_pretrained(name)
    except (OSError, ValueError) as error:  # what transformers raises for a name that it cannot reach, or make sense of
        reason = str(error).strip().partition("\n")[0]
        raise WrongArgument(argument, name, f", which cannot be loaded: {reason}") from error


def frozen(kind: Any, argument: str, name: str) -> Any:
    """A model to score with, where rewards compute."""
    return pretrained(kind, argument, name).eval().requires_grad_(False).to(scoring_device())


def read_weights(argument: str, path: str) -> dict[str, torch.Tensor]:
    """The tensors in a .safetensors file, or in one of torch.save, alone or under "state_dict". No code is unpickled.

    Raises WrongArgument for a file that holds something else.
    """
    if not Path(path).is_file():
        raise WrongArgument(argument, path, ", where there is no file")
    try:
        if path.endswith(".safetensors"):
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise WrongArgument(argument, path, f", which holds no weights alone: {reason}") from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not all(isinstance(each, torch.Tensor) for each in content.values()):
        raise WrongArgument(argument, path, "; accepted is a file of tensors by name")
    return dict(content)


def load_into(module: torch.nn.Module, weights: dict[str, torch.Tensor], argument: str, path: str) -> None:
    """Gives `module` exactly its weights. Raises WrongArgument where some are missing, too many or of other shapes."""
    own = module.state_dict()
    wrong = [name for name in own.keys() | weights.keys() if _shape(own, name) != _shape(weights, name)]
    if wrong:
        name = min(wrong)
        raise WrongArgument(
            argument,
            path,
            f", which has other weights than the model: {len(wrong)} differ, such as {name} of shape "
            f"{_shape(weights, name)} where {_shape(own, name)} belongs",
        )
    module.load_state_dict(weights)


def _shape(weights: Mapping[str, torch.Tensor], name: str) -> list[int] | None:
    return list(weights[name].shape) if name in weights else None


def needed(module: str, what: str, extra: str) -> Any:
    """The module, imported; ValueError says what to install where it is not there, and what needs it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != module:
            raise
        raise _not_installed(module, what, extra) from error


def _not_installed(module: str, what: str, extra: str) -> ValueError:
    return ValueError(f'{what} needs the package {module}, which is not installed: pip install "advflow[{extra}]"')


def lacking_package(module: str, what: str, extra: str) -> list[ValueError]:
    """What `needed` would raise, without an import."""
    return [] if importlib.util.find_spec(module) else [_not_installed(module, what, extra)]


def lacking_model(argument: str, name: str) -> list[ValueError]:
    """What is not on this machine of a model that `frozen` is to load."""
    return _lacking(argument, name, {"config.json": ["config.json"], "weights": WEIGHTS})


def lacking_processor(argument: str, name: str) -> list[ValueError]:
    """What is not on this machine of what prepares the inputs of a model."""
    files = {"preprocessor_config.json": ["preprocessor_config.json", "processor_config.json"]}
    return _lacking(argument, name, files, small=True)


def lacking_tokenizer(argument: str, name: str) -> list[ValueError]:
    files = {"tokenizer": ["tokenizer.json", "vocab.txt", "tokenizer_config.json"]}
    return _lacking(argument, name, files, small=True)


def lacking_file(argument: str, path: str, source: str) -> list[ValueError]:
    """That there is no file at `path`; `source` says where it is published."""
    return [] if Path(path).is_file() else [WrongArgument(argument, path, f", where there is no file: {source}")]


def _lacking(argument: str, name: str, kinds: Mapping[str, Sequence[str]], small: bool = False) -> list[ValueError]:
    lacking = [kind for kind, files in kinds.items() if not has_one_of(name, files)]
    if not lacking:
        return []
    if Path(name).is_dir():
        return [WrongArgument(argument, name, f", a folder without {' and '.join(lacking)}")]
    return [WrongArgument(argument, name, f", which is not on this machine: {how_to_get(name, small)}")]
