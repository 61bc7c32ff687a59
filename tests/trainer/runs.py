"""Small runs by the command line, and what tests compare of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from advflow.run.checkpoint import checkpoints
from advflow.run.interrupt import StopRequest
from advflow.run.log import EVALS, METRICS, read_rows
from advflow.settings.registry import METHODS
from safetensors.torch import load_file

SMALL = (
    "--rollout.prompts 2 --rollout.images_per_prompt 3 --rollout.steps 2 --draws.per_image 1 --rollout.batch 4 "
    "--evaluation.prompts_per_category 1 --evaluation.steps 2 --checkpoint_every 1 --evaluation.every 1"
).split()
OF_FLOWS = [name for name, method in METHODS.items() if method.process != "tokens"]
"""What --config tiny and sd35_medium train by; models of tokens have a config of their own."""
TIMES = ("seconds_rollout", "seconds_train", "seconds", "images_per_second")


def timeless(row: dict[str, Any]) -> dict[str, Any]:
    """What two runs of the same bits have alike of a row of metrics."""
    return {key: value for key, value in row.items() if key not in TIMES}


def stop_at_batch(patch: pytest.MonkeyPatch, number: int) -> None:
    """From now on a run is asked to stop at the batch of that number, counted from 1 over all it draws."""
    check, batches = StopRequest.check, []

    def counted(request: StopRequest) -> None:
        batches.append(request.iteration)
        request.asked = len(batches) == number
        check(request)

    patch.setattr(StopRequest, "check", counted)


def files(folder: Path) -> dict[str, bytes]:
    """The content of every file of a run by its path, but for TensorBoard's."""
    found = (path for path in sorted(folder.rglob("*")) if path.is_file() and "tensorboard" not in path.parts)
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    return [timeless(row) for row in read_rows(folder / name)]


def strict_json(text: str) -> Any:
    """`text` read as what JSON is, which has no NaN and no infinities."""

    def refuse(token: str) -> None:
        raise AssertionError(f"{token} is not JSON")

    return json.loads(text, parse_constant=refuse)


def assert_same_run(one: Path, other: Path) -> None:
    """The same rows, and the same bits in the last checkpoint."""
    for name in (METRICS, EVALS):
        assert rows(one, name) == rows(other, name)
    paths = [checkpoints(folder / "checkpoints")[-1] for folder in (one, other)]
    assert paths[0].name == paths[1].name
    tensors, others = (load_file(path / "tensors.safetensors") for path in paths)
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())
