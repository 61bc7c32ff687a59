"""Processes that hold a part of every weight each (FSDP2) train what one does, and go on where another number left."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from advflow.core.ranks import Ranks, batches, join_ranks
from advflow.core.sharding import clip_gradients, own_rows, shard
from advflow.policies import Policies, follow
from advflow.run.checkpoint import DamagedCheckpoint, load_checkpoint, save_checkpoint
from advflow.run.shards import Rows, read_tensors
from advflow.run.trainer import Trainer
from advflow.settings.model import RuntimeConfig
from diffusers import SD3Transformer2DModel
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader

from tests.trainer.runs import TIMES, files, timeless
from tests.trainer.several import run_together
from tests.trainer.test_ranks import OF_PARTS, config_of

# 9 images of an iteration: of two processes one makes more rollout batches and more micro-batches than the other.
WORDS = (
    "--device cpu --rollout.prompts 3 --rollout.images_per_prompt 3 --rollout.steps 2 --rollout.batch 4 "
    "--draws.per_image 1 --optim.micro_batch 4 --evaluation.prompts_per_category 1 --evaluation.steps 1 "
    "--evaluation.ema 0.9 --checkpoint_every 1 --evaluation.every 2 --iterations 2 --runtime.shard true"
).split()
KINDS = {
    "full": [],
    "checkpointed": ["--model.gradient_checkpointing", "true"],
    "lora": "--model.trainable lora --model.lora_rank 4".split(),
    # 9 images in 3 updates: of four processes some have no image of an update.
    "flow_grpo": "--algorithm flow_grpo --optim.steps_per_iteration 3 --sde.steps 1".split(),
    "curriculum": ["--capability.candidates", "5", "--data.reward", "{redness: 1, embedded: 0}"],
}


def held_bytes(policies: Policies) -> int:
    """Bytes of the parameters that this process holds, of all three policies."""
    roles: Any = ("learner", "rollout", "reference")
    found = {id(weight): weight for role in roles for weight in policies.transformer(role).parameters()}
    return sum(own_rows(weight)[0].nbytes for weight in found.values())


def trainer_of(kind: str, ranks: Ranks) -> Trainer:
    return Trainer(config_of([*WORDS, *KINDS[kind]]), ranks=ranks)


def train(trainer: Trainer, folder: Path) -> None:
    """Two iterations in `folder`, with a checkpoint after each."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for iteration in range(2):
        rows.append(trainer.iterate(iteration))
        save(trainer, folder, iteration + 1)
    scored = trainer.evaluate([0])
    kernels = trainer.policies.kernels
    found = {
        "held": held_bytes(trainer.policies),
        "fused": None if kernels is None else dict(kernels.replaced),
        "rows": rows,
        "categories": scored.categories,
    }
    (folder / f"found.{trainer.ranks.rank}").write_text(json.dumps(found))


def go_on(trainer: Trainer, start: Path, folder: Path) -> None:
    """The second iteration, into `folder`, from the checkpoint of the first in `start`."""
    folder.mkdir(parents=True, exist_ok=True)
    row = trainer.iterate(load_checkpoint(start / "000001", trainer.parts))
    save(trainer, folder, 2)
    (folder / f"row.{trainer.ranks.rank}").write_text(json.dumps(row))


def save(trainer: Trainer, folder: Path, iteration: int) -> None:
    together = trainer.ranks if trainer.ranks.sharded else None
    save_checkpoint(folder, iteration, trainer.parts, export=trainer.export, ranks=together)


def train_and_go_on(folder: Path) -> None:
    """What both kinds of training leave, and what they do from another's checkpoint: one job, one start."""
    ranks = join_ranks("cpu", sharded=True)
    train(trainer_of("lora", ranks), folder / "lora" / "two")
    full = trainer_of("full", ranks)
    train(full, folder / "full" / "two")
    go_on(full, folder / "full" / "two", folder / "full" / "resumed")
    go_on(full, folder / "full" / "one", folder / "full" / "from_one")
    look_closer(full)
    ranks.close()
    (folder / f"looked.{ranks.rank}").touch()


def look_closer(trainer: Trainer) -> None:
    """What can be asked of sharded parameters only where there are several processes."""
    learner = trainer.policies.learner
    for parameter in learner:
        parameter.grad = torch.full_like(parameter, 2.0)
    count = sum(map(torch.Tensor.numel, learner))
    norm = clip_gradients(learner, 1.0)
    assert norm == pytest.approx(2 * count**0.5)
    for part in (own_rows(parameter.grad)[0] for parameter in learner):
        torch.testing.assert_close(part, torch.full_like(part, count**-0.5))
    if not trainer.ranks.first:
        own_rows(learner[3].grad)[0].fill_(torch.nan)
    assert math.isnan(clip_gradients(learner, 1.0))

    copies = [[torch.nn.Parameter(parameter.detach().clone()) for parameter in learner[:9]] for _ in range(2)]
    for parameters, at_once in zip(copies, (True, False), strict=True):  # as a GPU steps them, and as a CPU does
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        torch.optim.AdamW(parameters, lr=0.1, foreach=at_once).step()
    for one, other in zip(*copies, strict=True):
        torch.testing.assert_close(own_rows(one)[0], own_rows(other)[0])

    plain = trainer_of("full", Ranks()).policies
    transformer = plain.transformer("learner")
    shard(transformer, transformer.transformer_blocks)
    with pytest.raises(RuntimeError, match="the parameters of 'learner' are not in the model any more: fully_shard"):
        follow(plain, 0.5)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """For both kinds: `one` process, `two`, and two that go on from the checkpoints of either."""
    folder = tmp_path_factory.mktemp("sharding")
    for kind in ("full", "lora"):
        train(trainer_of(kind, Ranks()), folder / kind / "one")
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
    assert two["fused"] == one["fused"]
    other = found(job / kind / "two", 1)
    assert [timeless(row) for row in other["rows"]] == [timeless(row) for row in two["rows"]]
    assert other["categories"] == two["categories"]
    assert_close_tensors(job / kind / "one", job / kind / "two")


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_process_holds_its_part(job: Path, kind: str) -> None:
    one = found(job / kind / "one")["held"]
    each = [found(job / kind / "two", rank)["held"] for rank in range(2)]
    print(f"{kind}: {one} bytes of parameters in one process, of two {each}")
    assert max(each) <= 0.55 * one


def test_sharded_gradients_and_parameters_are_as_whole_ones(job: Path) -> None:
    """`look_closer` has asserted so, in both processes."""
    assert all((job / f"looked.{rank}").exists() for rank in range(2))


def test_two_go_on_to_the_same_bits_and_from_one_process_closely(job: Path) -> None:
    two = job / "full" / "two"
    assert files(two / "000002") == files(job / "full" / "resumed" / "000002")
    for name, same in (("resumed", True), ("from_one", False)):
        its = json.loads((job / "full" / name / "row.0").read_text())
        if same:
            assert timeless(its) == timeless(found(two)["rows"][1])
        assert_close_rows(found(job / "full" / "one")["rows"][1], its)
    assert_close_tensors(job / "full" / "one", job / "full" / "from_one")


def test_one_process_goes_on_from_two(job: Path, tmp_path: Path) -> None:
    two = job / "full" / "two"
    go_on(trainer_of("full", Ranks()), two, tmp_path)
    assert_close_rows(found(two)["rows"][1], json.loads((tmp_path / "row.0").read_text()))
    assert_close_tensors(two, tmp_path)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning")
def test_a_sharded_checkpoint_is_what_torch_and_diffusers_read(job: Path) -> None:
    path = job / "full" / "two" / "000002"
    assert {each.name for each in path.iterdir()} == {
        "state.json", "tensors.safetensors", "tensors.1.safetensors", "transformer",
    }  # fmt: skip
    stored = tensors(job / "full" / "two")
    read = {name: torch.full_like(tensor, torch.nan) for name, tensor in stored.items()}
    dcp.load(read, storage_reader=HuggingFaceStorageReader(str(path)), no_dist=True)
    torch.testing.assert_close(read, stored, rtol=0, atol=0)
    stock = SD3Transformer2DModel.from_pretrained(path / "transformer")
    for number, parameter in enumerate(stock.parameters()):
        assert torch.equal(parameter, stored[f"average.{number:04d}"])  # what is evaluated
    one, two = (files(job / "full" / name / "000002" / "transformer") for name in ("one", "two"))
    assert one.keys() == two.keys() and one["config.json"] == two["config.json"]
    assert files(job / "lora" / "two" / "000002").keys() == files(job / "lora" / "one" / "000002").keys()


@pytest.mark.parametrize("damage", ["lost", "cut", "flipped"])
def test_a_shard_that_is_not_what_was_written_is_named(job: Path, damage: str, tmp_path: Path) -> None:
    path = tmp_path / "000002"
    shutil.copytree(job / "full" / "two" / "000002", path)
    hurt = path / "tensors.1.safetensors"
    content = bytearray(hurt.read_bytes())
    hurt.unlink()
    if damage != "lost":
        content[-5] ^= 1
        hurt.write_bytes(content if damage == "flipped" else content[:-5])
    with pytest.raises(DamagedCheckpoint, match="is damaged: its files are not those that were written"):
        load_checkpoint(path, {})


@pytest.mark.parametrize(
    ("count", "size", "most", "expected"),
    [
        (5, 2, 5, [(0, 2, True), (2, 4, True), (4, 5, True)]),
        (4, 4, 5, [(0, 4, True), (0, 1, False)]),
        (0, 4, 9, [(0, 1, False)] * 3),
    ],
)
def test_those_with_fewer_batches_make_up_for_it(
    count: int, size: int, most: int, expected: list[tuple[int, int, bool]]
) -> None:
    assert [(rows.start, rows.stop, used) for rows, used in batches(count, size, most)] == expected


def test_processes_are_in_step_where_they_are_sharded() -> None:
    ranks = Ranks()
    ranks.rank, ranks.size = 1, 3
    assert ranks.in_step(7) == [ranks.share(7)] == [slice(2, 4)]
    ranks.sharded = True
    assert ranks.in_step(7) == [slice(0, 2), slice(2, 4), slice(4, 7)]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"cuda_graphs": True}, "runtime.cuda_graphs is True, with runtime.shard; accepted is one of them"),
        ({"merge_lora": "all"}, 'runtime.merge_lora is "all", with runtime.shard, whose weights are never merged'),
    ],
)
def test_what_cannot_be_together_is_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        RuntimeConfig(shard=True, **settings)
