"""Whole jobs of processes that hold a part of every weight: as a user starts them, killed, and of other sizes."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest
import torch
from advflow.cli import main
from advflow.core.ranks import Ranks, join_ranks
from advflow.core.sharding import own_rows, shard
from advflow.models.sd3 import load_pipeline
from advflow.run import checkpoint
from advflow.run.log import EVALS, METRICS, read_rows
from advflow.settings.model import ModelConfig
from torch import distributed

from tests.trainer.runs import TIMES, files, rows
from tests.trainer.several import TORCHRUN, run_together, start
from tests.trainer.test_sharding import (
    WORDS,
    assert_close_rows,
    assert_close_tensors,
    found,
    go_on,
    tensors,
    train,
    trainer_of,
)

pytestmark = pytest.mark.slow

# On CPUs its own option for them starts one process.
ACCELERATE = (
    "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --gpu_ids all --mixed_precision no "
    "--dynamo_backend no --main_process_port 0 -m advflow train"
).split()

# Kills the second process, once, in a rollout or before a checkpoint is complete.
DOOMED = """
import os, pathlib, signal
import advflow.run.checkpoint as checkpoint
from advflow.rewards import Scores

HERE, write = pathlib.Path(__file__).parent, checkpoint.write_tensors
calls = {"rollout": 0, "checkpoint": 0}

def die(where):
    calls[where] += 1
    deadly = HERE / where
    if os.environ.get("RANK") == "1" and calls[where] == 2 and deadly.exists():
        deadly.unlink()
        os.kill(os.getpid(), signal.SIGKILL)

def write_or_die(*arguments):
    die("checkpoint")
    return write(*arguments)

checkpoint.write_tensors = write_or_die

class Doomed:
    def __call__(self, images, prompts):
        if len(images) > 3:  # no evaluation, which has three images in each process
            die("rollout")
        red = images[:, 0].mean((1, 2))
        return Scores(red, red)
"""


def assert_close_runs(one: Path, other: Path) -> None:
    for name in (METRICS, EVALS):
        for row, its in zip(read_rows(one / name), read_rows(other / name), strict=True):
            numbers, its_numbers = (
                {key: value for key, value in each.items() if key not in (*TIMES, "categories")} for each in (row, its)
            )
            assert_close_rows(numbers, its_numbers)
    assert_close_tensors(one / "checkpoints", other / "checkpoints")


@pytest.mark.parametrize("where", ["rollout", "checkpoint"])
def test_a_killed_job_ends_and_goes_on(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "doomed.py").write_text(DOOMED)
    words = [*WORDS, "--data.reward", "doomed:Doomed"]
    whole = start(tmp_path, TORCHRUN, "--out", "whole", *words)
    assert whole.returncode == 0, whole.stderr
    (tmp_path / where).touch()
    killed = start(tmp_path, TORCHRUN, "--out", "killed", *words)
    assert killed.returncode != 0 and not (tmp_path / where).exists()
    assert [path.name for path in (tmp_path / "killed" / "checkpoints").glob("0*")] == ["000001"]
    shutil.copytree(tmp_path / "killed", tmp_path / "alone")

    resumed = start(tmp_path, TORCHRUN, "--out", "killed", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    for name in (METRICS, EVALS):
        assert rows(tmp_path / "whole", name) == rows(tmp_path / "killed", name)
    whole_files, its_files = (files(tmp_path / name / "checkpoints" / "000002") for name in ("whole", "killed"))
    assert whole_files == its_files

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoint, "write_tensors", checkpoint.write_tensors)  # is again what it is, afterwards
    main(["train", "--out", "alone", "--resume"])
    assert_close_runs(tmp_path / "whole", tmp_path / "alone")


def test_accelerate_launches_what_torchrun_does(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    main(["train", "--out", str(tmp_path / "alone"), *WORDS])
    ended = start(tmp_path, ACCELERATE, "--out", "together", *WORDS)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("report: ") == 1
    written = files(tmp_path / "together" / "checkpoints" / "000002")
    assert {name for name in written if "/" not in name} == {
        "state.json", "tensors.safetensors", "tensors.1.safetensors",
    }  # fmt: skip
    assert_close_runs(tmp_path / "alone", tmp_path / "together")


def train_in_step(folder: Path, start: Path | None, kind: str) -> None:
    ranks = join_ranks("cpu", sharded=True)
    trainer = trainer_of(kind, ranks)
    if start is None:
        train(trainer, folder)
    else:
        go_on(trainer, start, folder)
    ranks.close()


@pytest.mark.parametrize(("kind", "size"), [("checkpointed", 4), ("lora", 4), ("flow_grpo", 4), ("curriculum", 2)])
def test_any_number_of_processes_trains_what_one_does(kind: str, size: int, tmp_path: Path) -> None:
    train(trainer_of(kind, Ranks()), tmp_path / "one")
    run_together(size, train_in_step, tmp_path / "several", None, kind)
    one, several = (found(tmp_path / name) for name in ("one", "several"))
    for row, its in zip(one["rows"], several["rows"], strict=True):
        assert_close_rows(row, its)
    assert several["categories"] == pytest.approx(one["categories"], abs=1e-5)
    assert_close_tensors(tmp_path / "one", tmp_path / "several")
    held = [found(tmp_path / "several", rank)["held"] for rank in range(size)]
    print(f"{kind}: {one['held']} bytes of parameters in one process, of {size} {held}")
    assert max(held) <= (1 / size + 0.05) * one["held"]


def test_three_processes_go_on_from_two(tmp_path: Path) -> None:
    run_together(2, train_in_step, tmp_path / "two", None, "full")
    run_together(3, train_in_step, tmp_path / "three", tmp_path / "two", "full")
    assert_close_tensors(tmp_path / "two", tmp_path / "three")
    assert tensors(tmp_path / "three").keys() == tensors(tmp_path / "two").keys()


def test_compiled_blocks_see_weights_that_are_put_together(tmp_path: Path) -> None:
    model = load_pipeline(ModelConfig(), torch.device("cpu")).transformer
    models = [copy.deepcopy(model), model]
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        shard(model, model.transformer_blocks)
        for block in model.transformer_blocks:
            block.compile(backend="aot_eager")
        config, rng = model.config, torch.Generator().manual_seed(0)
        inputs = (
            torch.randn(2, config.in_channels, 8, 8, generator=rng),
            torch.randn(2, 12, config.joint_attention_dim, generator=rng),
            torch.randn(2, config.pooled_projection_dim, generator=rng),
            torch.full((2,), 500.0),
        )
        for _ in range(2):  # before and after an update
            with torch.no_grad():
                velocities = [each(*inputs, return_dict=False)[0] for each in models]
            torch.testing.assert_close(velocities[1], velocities[0], rtol=1e-5, atol=1e-5)
            optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in models]
            for each in models:
                each(*inputs, return_dict=False)[0].square().mean().backward()
            for one, other in zip(*(each.parameters() for each in models), strict=True):
                torch.testing.assert_close(own_rows(other.grad)[0], one.grad, rtol=1e-4, atol=1e-6)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    finally:
        distributed.destroy_process_group()
