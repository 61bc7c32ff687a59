"""Checkpoints: safetensors and JSON, no pickle; a checkpoint folder exists only when it is complete."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from advflow.policies import Policies

_KEEP = 2
_TENSORS = "tensors.safetensors"
_STATE = "state.json"


@dataclass(frozen=True)
class RunState:
    """What a run depends on beside tensors: the iteration to run next, and the scale of the reference's weight."""

    iteration: int
    reference_scale: float = 1.0


def save_checkpoint(folder: Path, state: RunState, policies: Policies, optimizer: torch.optim.Optimizer) -> Path:
    """Writes everything that the next iteration depends on; keeps the newest two."""
    target = folder / f"{state.iteration:06d}"
    scratch = folder / f".{state.iteration:06d}.partial"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    tensors = _flatten(policies, optimizer)
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, scratch / _TENSORS)
    (scratch / _STATE).write_text(json.dumps(asdict(state)))
    for file in scratch.iterdir():
        _flush_to_disk(file)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(scratch, target)
    for stale in checkpoints(folder)[:-_KEEP]:
        shutil.rmtree(stale)
    return target


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints under `folder`, oldest first."""
    return sorted(path for path in folder.glob("[0-9]*") if (path / _STATE).is_file())


def load_checkpoint(path: Path, policies: Policies, optimizer: torch.optim.Optimizer | None) -> RunState:
    """Restores what `save_checkpoint` wrote, bit for bit."""
    stored = load_file(path / _TENSORS)
    if optimizer is not None:
        _materialise_optimizer_state(optimizer)
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
            tensor.copy_(stored[name])
    return RunState(**json.loads((path / _STATE).read_text()))


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


def _flush_to_disk(file: Path) -> None:
    with file.open("rb") as handle:
        os.fsync(handle.fileno())
