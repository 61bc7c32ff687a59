"""Adapters to start from, as diffusers, PEFT and other runs have saved them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open

from advflow.settings.model import ModelConfig

_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")  # diffusers' and ours; PEFT's
_PEFT_CONFIG = "adapter_config.json"
_PREFIXES = ("base_model.model.", "transformer.")  # before the names of the transformer's modules: PEFT's; diffusers'
_ACCEPTED = f"a .safetensors file, or a folder with {' or '.join(_FILES)}"
# Initialisations that also change the base, so that the adapter alone does not say what the model was.
_OTHER_BASE = ("pissa", "olora", "corda", "loftq")


@dataclass(frozen=True)
class Adapter:
    """LoRA weights by their names in the transformer. `named` begins a sentence about them."""

    named: str
    weights: Mapping[str, torch.Tensor]
    targets: list[str]

    @torch.no_grad()
    def load_into(self, transformer: ModelMixin, adapter: str) -> None:
        """Writes the weights over those of `adapter`. Raises ValueError, before any, where they do not fit."""
        own = get_peft_model_state_dict(transformer, adapter_name=adapter)
        missing, unknown = sorted(own.keys() - self.weights.keys()), sorted(self.weights.keys() - own.keys())
        faults = [f"it has no {missing[0]} ({len(missing)} missing)"] if missing else []
        faults += [f"it has {unknown[0]}, which the model has not ({len(unknown)} unknown)"] if unknown else []
        if faults:
            targets = f"; accepted are the adapters of model.lora_targets, and the file's are {self.targets}"
            raise ValueError(
                f"{self.named}, which does not fit: {' and '.join(faults)}{targets if self.targets else ''}"
            )
        for name, weight in own.items():
            given, wanted = tuple(self.weights[name].shape), tuple(weight.shape)
            if given != wanted:
                raise ValueError(f"{self.named}, which does not fit: its {name} is {given}, the model's {wanted}")
        for name, weight in own.items():
            weight.copy_(self.weights[name])


def read_adapter(config: ModelConfig) -> Adapter | None:
    """The adapter that `model.lora_start` names; None where it names none.

    Raises ValueError where there is none, where it is of another kind, and where its rank or alpha are not those set.
    """
    if config.lora_start is None:
        return None
    named = f"model.lora_start is {config.lora_start!r}"
    path = _file(Path(config.lora_start), named)
    try:
        with safe_open(path, "pt") as opened:
            weights = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # no mapping
            written = _of_diffusers(opened.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{named}, and {path} cannot be read: {error}") from error
    settings = written or _of_peft(path.parent / _PEFT_CONFIG, named)
    weights = {_without_prefix(name): weight for name, weight in weights.items()}
    _refuse_other_kinds(weights, settings, named)
    _require_scale(weights, settings, config, named)
    return Adapter(named, weights, _targets(settings))


def _file(path: Path, named: str) -> Path:
    if not path.exists():
        raise ValueError(f"{named}, where there is nothing; accepted: {_ACCEPTED}")
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ValueError(f"{named}, a {path.suffix or 'file without an ending'}; accepted: {_ACCEPTED}")
        return path
    found = [path / name for name in _FILES if (path / name).is_file()]
    if len(found) != 1:
        what = (
            "has both files"
            if found
            else f"holds {', '.join(sorted(each.name for each in path.iterdir())) or 'nothing'}"
        )
        raise ValueError(f"{named}, which {what:.300}; accepted: {_ACCEPTED}")
    return found[0]


def _of_diffusers(metadata: Mapping[str, str]) -> dict[str, Any]:
    """What the file says of itself, by PEFT's names."""
    told = json.loads(metadata.get(LORA_ADAPTER_METADATA_KEY, "{}"))
    return {name.removeprefix("transformer."): value for name, value in told.items()}


def _of_peft(path: Path, named: str) -> dict[str, Any]:
    """What stands beside the file; nothing where there is nothing."""
    if not path.is_file():
        return {}
    try:
        told: dict[str, Any] = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{named}, and {path} cannot be read: {error}") from error
    return told


def _without_prefix(name: str) -> str:
    return next((name.removeprefix(prefix) for prefix in _PREFIXES if name.startswith(prefix)), name)


def _targets(settings: Mapping[str, Any]) -> list[str]:
    targets = settings.get("target_modules")
    return sorted(targets) if isinstance(targets, list) else []


def _refuse_other_kinds(weights: Mapping[str, torch.Tensor], settings: Mapping[str, Any], named: str) -> None:
    if not any(name.endswith(".lora_A.weight") for name in weights):
        first = min(weights, default="nothing")
        raise ValueError(
            f"{named}, which holds no LoRA as diffusers and PEFT name it, but {first}; accepted: {_ACCEPTED}"
        )
    initial = str(settings.get("init_lora_weights")).lower()
    kind = settings.get("peft_type") or "LORA"
    for what, there in {
        f"peft_type {kind}": kind != "LORA",
        "use_dora": settings.get("use_dora"),
        "use_rslora": settings.get("use_rslora"),
        f"init_lora_weights {initial}": initial.startswith(_OTHER_BASE),
    }.items():
        if there:
            raise ValueError(f"{named}, an adapter with {what}; accepted: plain LoRA, of alpha / rank")


def _require_scale(
    weights: Mapping[str, torch.Tensor], settings: Mapping[str, Any], config: ModelConfig, named: str
) -> None:
    """Refuses another rank or alpha than is set. Of a file without alpha diffusers takes it to be the rank."""
    ranks = {name: len(weight) for name, weight in weights.items() if name.endswith(".lora_A.weight")}
    for name, rank in ranks.items():
        if rank != config.lora_rank:
            raise ValueError(f"model.lora_rank is {config.lora_rank}; {named}, whose {name} has rank {rank}")
    told = settings.get("lora_alpha")
    alphas = {config.lora_rank if told is None else told, *(settings.get("alpha_pattern") or {}).values()}
    if alphas != {config.lora_alpha}:
        has = (
            f"has alpha {', '.join(map(str, sorted(alphas)))}"
            if told is not None
            else "names no alpha, so that it is the rank"
        )
        raise ValueError(f"model.lora_alpha is {config.lora_alpha}; {named}, which {has}")
