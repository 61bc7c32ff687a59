"""Checkpoints: safetensors and JSON, no pickle; a checkpoint folder exists only when it is complete."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from advflow.policies import Policies

_KEEP = 2
_TENSORS = "tensors.safetensors"
_STATE = "state.json"
_DIGEST = "sha256"


@dataclass(frozen=True)
class RunState:
    """What a run depends on beside tensors: the iteration to run next, and the scale of the reference's weight."""

    iteration: int
    reference_scale: float = 1.0


class DamagedCheckpoint(ValueError):
    """A checkpoint that is not what was written."""


def save_checkpoint(
    folder: Path, state: RunState, policies: Policies, optimizer: torch.optim.Optimizer, best: int | None = None
) -> Path:
    """Writes everything that the next iteration depends on; keeps the newest two, and that of iteration `best`."""
    target = folder / checkpoint_name(state.iteration)
    scratch = folder / f".{target.name}.partial"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    tensors = _flatten(policies, optimizer)
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, scratch / _TENSORS)
    stored = asdict(state)
    (scratch / _STATE).write_text(json.dumps(stored | {_DIGEST: _digest(scratch / _TENSORS, stored)}))
    shutil.copymode(scratch / _STATE, scratch / _TENSORS)  # safetensors leaves its files to their owner alone
    for path in (*scratch.iterdir(), scratch):
        _flush_to_disk(path)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(scratch, target)
    _flush_to_disk(folder)
    for stale in checkpoints(folder)[:-_KEEP]:
        if best is None or stale.name != checkpoint_name(best):
            shutil.rmtree(stale)
    return target


def checkpoint_name(iteration: int) -> str:
    """The folder of the checkpoint made after `iteration` iterations."""
    return f"{iteration:06d}"


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints under `folder`, oldest first."""
    return [path for path in _numbered(folder) if (path / _STATE).is_file()]


def load_newest(folder: Path, policies: Policies, optimizer: torch.optim.Optimizer | None) -> RunState | None:
    """Restores the newest checkpoint under `folder` that is whole, naming those that are not; None where there is none.

    Raises ValueError where none of them is whole, or the newest whole one does not fit the policies.
    """
    damages: list[str] = []
    for path in reversed(_numbered(folder)):
        try:
            state = load_checkpoint(path, policies, optimizer)
        except DamagedCheckpoint as error:
            damages.append(str(error))
            continue
        if damages:
            warnings.warn(f"{'; '.join(damages)}; going on from {path}", UserWarning, stacklevel=2)
        return state
    if damages:
        raise DamagedCheckpoint(f"no checkpoint can be read: {'; '.join(damages)}")
    return None


def load_checkpoint(path: Path, policies: Policies, optimizer: torch.optim.Optimizer | None) -> RunState:
    """Restores what `save_checkpoint` wrote, bit for bit.

    Raises DamagedCheckpoint, a ValueError, where that is no longer there, before anything is restored; ValueError where
    it is of another model.
    """
    state, stored = _read(path)
    if optimizer is not None:
        _materialise_optimizer_state(optimizer)
        stepped = {name.split(".")[1] for name in stored if name.startswith("optimizer.")}
        for index, parameter in enumerate(policies.learner):
            if f"{index:04d}" not in stepped:  # every step so far was skipped
                del optimizer.state[parameter]
    expected = _flatten(policies, optimizer)
    missing = sorted(expected.keys() - stored.keys())
    if missing:
        raise ValueError(f"checkpoint {path} does not fit this run: it has no {missing[0]!r} ({len(missing)} missing)")
    for name, tensor in expected.items():
        if tensor.shape != stored[name].shape:
            raise ValueError(
                f"checkpoint {path} does not fit this run: {name} is {tuple(stored[name].shape)}, "
                f"the model's {tuple(tensor.shape)}"
            )
    with torch.no_grad():
        for name, tensor in expected.items():
            tensor.copy_(stored[name])
    return state


def _numbered(folder: Path) -> list[Path]:
    return sorted((path for path in folder.glob("[0-9]*") if path.name.isdecimal()), key=lambda path: int(path.name))


def _read(path: Path) -> tuple[RunState, dict[str, torch.Tensor]]:
    """What the checkpoint at `path` holds, compared with the checksum that older ones do not have."""
    for name in (_STATE, _TENSORS):
        if not (path / name).is_file():
            raise DamagedCheckpoint(f"checkpoint {path} is damaged: it has no {name}")
    try:
        state = json.loads((path / _STATE).read_text(encoding="utf-8"))
        digest = state.pop(_DIGEST, None)
        restored = RunState(**state)
    except (ValueError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(f"checkpoint {path} is damaged: {_STATE} cannot be read") from error
    if digest is not None and digest != _digest(path / _TENSORS, state):
        raise DamagedCheckpoint(f"checkpoint {path} is damaged: its files are not those that were written")
    try:
        return restored, load_file(path / _TENSORS)
    except SafetensorError as error:
        raise DamagedCheckpoint(f"checkpoint {path} is damaged: {_TENSORS} cannot be read ({error})") from error


def _digest(tensors: Path, state: dict[str, Any]) -> str:
    """Checksum of both files of a checkpoint."""
    with tensors.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256")
    digest.update(json.dumps(state, sort_keys=True).encode())
    return digest.hexdigest()


def _flatten(policies: Policies, optimizer: torch.optim.Optimizer | None) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for index, (learner, rollout) in enumerate(zip(policies.learner, policies.rollout, strict=True)):
        tensors[f"learner.{index:04d}"] = learner
        tensors[f"rollout.{index:04d}"] = rollout
        if optimizer is not None:
            for key, value in optimizer.state[learner].items():
                tensors[f"optimizer.{index:04d}.{key}"] = value
    return tensors


def _materialise_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """Makes AdamW create its state, which it does lazily: a step of size zero on zero gradients moves nothing."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _flush_to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
