"""Processes that hold a part of every weight each (FSDP2) train what one does, and go on from each other's checkpoints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from advflow.cli import main
from advflow.core.ranks import Ranks, batches, join_ranks
from advflow.core.sharding import own_rows
from advflow.policies import Policies
from advflow.run.checkpoint import DamagedCheckpoint, checkpoints, load_checkpoint, save_checkpoint
from advflow.run.log import METRICS, read_rows
from advflow.run.shards import Rows, read_tensors
from advflow.run.trainer import Trainer
from diffusers import SD3Transformer2DModel
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader

from tests.trainer.runs import files
from tests.trainer.several import run_together
from tests.trainer.test_ranks import OF_PARTS, TIMES, config_of

# 9 images of an iteration: of two processes one makes more rollout batches and more micro-batches than the other.
WORDS = (
    "--device cpu --rollout.prompts 3 --rollout.images_per_prompt 3 --rollout.steps 2 --rollout.batch 4 "
    "--draws.per_image 2 --optim.micro_batch 4 --evaluation.prompts_per_category 1 --evaluation.steps 2 "
    "--checkpoint_every 1 --evaluation.every 2 --iterations 2 --runtime.shard true"
).split()
KINDS = {
    "full": ["--model.gradient_checkpointing", "true"],
    "lora": "--model.trainable lora --model.lora_rank 4".split(),
    # 9 images in 3 updates: of four processes some have no image of an update.
    "flow_grpo": "--algorithm flow_grpo --optim.steps_per_iteration 3 --sde.steps 1".split(),
}


def held_bytes(policies: Policies) -> int:
    """Bytes of the parameters that this process holds, of all three policies."""
    roles: Any = ("learner", "rollout", "reference")
    found = {id(weight): weight for role in roles for weight in policies.transformer(role).parameters()}
    return sum(own_rows(weight)[0].nbytes for weight in found.values())


def train(folder: Path, kind: str) -> None:
    """Two iterations in `folder`, with a checkpoint after each, as one of the processes that there are."""
    ranks = join_ranks("cpu", sharded=True)
    trainer = Trainer(config_of([*WORDS, *KINDS[kind]]), ranks=ranks)
    together, export = (ranks if ranks.sharded else None), trainer.policies.export
    rows = []
    for iteration in range(2):
        rows.append(trainer.iterate(iteration))
        save_checkpoint(folder, iteration + 1, trainer.parts, export=export, ranks=together)
    scored = trainer.evaluate([0])
    found = {"held": held_bytes(trainer.policies), "rows": rows, "categories": scored.categories}
    (folder / f"found.{ranks.rank}").write_text(json.dumps(found))
    ranks.close()


def go_on(start: Path, folder: Path, kind: str) -> None:
    """The second iteration, into `folder`, from the checkpoint of the first in `start`."""
    ranks = join_ranks("cpu", sharded=True)
    trainer = Trainer(config_of([*WORDS, *KINDS[kind]]), ranks=ranks)
    row = trainer.iterate(load_checkpoint(start / "000001", trainer.parts))
    together, export = (ranks if ranks.sharded else None), trainer.policies.export
    save_checkpoint(folder, 2, trainer.parts, export=export, ranks=together)
    (folder / f"row.{ranks.rank}").write_text(json.dumps(row))
    ranks.close()


def train_and_go_on(folder: Path) -> None:
    """What both kinds of training leave, and what they do from another's checkpoint: one job, one start."""
    for kind in ("full", "lora"):
        for name in ("one", "two", "resumed", "from_one"):
            (folder / kind / name).mkdir(parents=True, exist_ok=True)
        train(folder / kind / "two", kind)
    go_on(folder / "full" / "two", folder / "full" / "resumed", "full")
    go_on(folder / "full" / "one", folder / "full" / "from_one", "full")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """For both kinds: `one` process, `two`, and two that go on from the checkpoints of either."""
    folder = tmp_path_factory.mktemp("sharding")
    for kind in ("full", "lora"):
        (folder / kind / "one").mkdir(parents=True)
        train(folder / kind / "one", kind)
    run_together(2, train_and_go_on, folder)
    yield folder


def found(folder: Path, rank: int = 0) -> dict[str, Any]:
    stored: dict[str, Any] = json.loads((folder / f"found.{rank}").read_text())
    return stored


def assert_close_rows(one: dict[str, float], other: dict[str, float]) -> None:
    assert one.keys() == other.keys()
    for key in one.keys() - {*TIMES, *OF_PARTS}:
        assert other[key] == pytest.approx(one[key], rel=1e-5, abs=1e-5), key


def tensors(folder: Path, name: str = "000002") -> dict[str, torch.Tensor]:
    return {
        name: stored[:] if isinstance(stored, Rows) else stored for name, stored in read_tensors(folder / name).items()
    }


def assert_close_tensors(one: Path, other: Path) -> None:
    torch.testing.assert_close(tensors(other), tensors(one), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_two_processes_train_what_one_does(job: Path, kind: str) -> None:
    one, two = (found(job / kind / name) for name in ("one", "two"))
    for row, its in zip(one["rows"], two["rows"], strict=True):
        assert_close_rows(row, its)
    assert two["categories"] == pytest.approx(one["categories"], abs=1e-5)
    for key in ("rows", "categories"):  # whoever asks, a norm and a skipped step too
        others = found(job / kind / "two", 1)[key]
        assert [without_times(row) for row in others] == [without_times(row) for row in two[key]] if key == "rows" else (
            others == two[key]
        )
    assert_close_tensors(job / kind / "one", job / kind / "two")


def without_times(row: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in row.items() if key not in TIMES}


def test_a_process_holds_its_part(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        for kind in ("full", "lora"):
            one = found(job / kind / "one")["held"]
            each = [found(job / kind / "two", rank)["held"] for rank in range(2)]
            print(f"\n{kind}: {one} bytes of parameters in one process, of two {each}", end="")
            assert max(each) <= (0.55 if kind == "full" else 0.6) * one
