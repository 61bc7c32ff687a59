"""Checkpoints: damage is found and named, the best one stays, files are as readable as their neighbours."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from advflow.cli import main
from advflow.run.checkpoint import checkpoints, load_checkpoint, load_newest, save_checkpoint
from advflow.run.evaluate import Evaluation
from advflow.run.log import METRICS
from advflow.run.state import OptimizerState, State, copy_tensors, weights_of
from advflow.run.trainer import Trainer
from advflow.settings.config import TrainConfig
from advflow.settings.model import ModelConfig
from advflow.world.pretrain import pretrain
from advflow.world.settings import FlowStage, PretrainSettings

from tests.trainer.runs import SMALL, rows

LORA = ModelConfig(trainable="lora", lora_rank=4, lora_alpha=8)


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-40] ^= 1  # of the tensors a mantissa, of the state a digit of the checksum: both still parse
    path.write_bytes(content)


def _other_number(path: Path) -> None:
    text = path.read_text()
    path.write_text(text.replace('"iteration": 2', '"iteration": 1'))


DAMAGES = [
    ("tensors.safetensors", _truncate, "not those that were written"),
    ("tensors.safetensors", _empty, "not those that were written"),
    ("tensors.safetensors", _flip, "not those that were written"),
    ("tensors.safetensors", Path.unlink, "has no tensors.safetensors"),
    ("state.json", _truncate, "state.json cannot be read"),
    ("state.json", _empty, "state.json cannot be read"),
    ("state.json", _flip, "not those that were written"),
    ("state.json", _other_number, "not those that were written"),
    ("state.json", Path.unlink, "has no state.json"),
]


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    return Trainer(TrainConfig(model=LORA))


@pytest.mark.parametrize(("name", "damage", "reason"), DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(
    trainer: Trainer, tmp_path: Path, name: str, damage: Callable[[Path], Any], reason: str
) -> None:
    kept = []
    for iteration in (1, 2):
        with torch.no_grad():
            for parameter in trainer.policies.learner:
                parameter.add_(1.0)
        kept.append([parameter.detach().clone() for parameter in trainer.policies.learner])
        save_checkpoint(tmp_path, iteration, trainer.parts)
    assert load_newest(tmp_path, trainer.parts) == 2
    damage(tmp_path / "000002" / name)
    with pytest.warns(UserWarning, match=rf"checkpoint .*000002 is damaged: .*{reason}.*; going on from .*000001"):
        assert load_newest(tmp_path, trainer.parts) == 1
    assert all(torch.equal(a, b) for a, b in zip(kept[0], trainer.policies.learner, strict=True))
    (tmp_path / "000001" / "tensors.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"no checkpoint can be read: .*000002 is damaged.*000001 is damaged"):
        load_newest(tmp_path, trainer.parts)
    assert all(torch.equal(a, b) for a, b in zip(kept[0], trainer.policies.learner, strict=True))


def test_an_optimizer_that_never_stepped_is_restored(trainer: Trainer, tmp_path: Path) -> None:
    """Every step may have been skipped so far; AdamW's count of steps must not begin at 1 then."""
    new = torch.optim.AdamW(trainer.policies.learner)
    parts = trainer.parts | {"optimizer": OptimizerState(new, trainer.policies.learner)}
    save_checkpoint(tmp_path, 1, parts)
    assert load_newest(tmp_path, parts) == 1
    assert not any(new.state.values())


class Tracker:
    """A part as others may add one: tensors of its own shapes, and plain values."""

    def __init__(self) -> None:
        self.seen, self.gamma, self.names = torch.zeros(3), 1.0, ["a"]

    def state_dict(self) -> State:
        return {"seen": self.seen, "gamma": self.gamma, "names": self.names}

    def load_state_dict(self, state: State) -> None:
        copy_tensors({"seen": state["seen"]}, {"seen": self.seen})
        self.gamma, self.names = state["gamma"], state["names"]


def test_a_part_of_ones_own_goes_on_bit_for_bit(trainer: Trainer, tmp_path: Path) -> None:
    saved, fresh = Tracker(), Tracker()
    saved.seen, saved.gamma, saved.names = torch.rand(3), 0.1 + 0.2, ["a", "b"]
    save_checkpoint(tmp_path, 4, trainer.parts | {"capability": saved})
    assert load_newest(tmp_path, trainer.parts | {"capability": fresh}) == 4
    assert torch.equal(saved.seen, fresh.seen) and (saved.gamma, saved.names) == (fresh.gamma, fresh.names)
    assert not list(tmp_path.rglob("*.pkl")) and {path.suffix for path in (tmp_path / "000004").iterdir()} == {
        ".json",
        ".safetensors",
    }


def test_a_part_too_many_or_too_few_is_named(trainer: Trainer, tmp_path: Path) -> None:
    more = trainer.parts | {"capability": Tracker()}
    with_it, without = (
        save_checkpoint(tmp_path / name, 1, parts) for name, parts in (("a", more), ("b", trainer.parts))
    )
    before = [parameter.detach().clone() for parameter in trainer.policies.learner]
    with torch.no_grad():
        for parameter in trainer.policies.learner:
            parameter.add_(1.0)
    with pytest.raises(ValueError, match="b/000001 does not fit this run: it has no part 'capability'"):
        load_checkpoint(without, more)
    with pytest.raises(ValueError, match="it has a part 'capability', which nothing in this run goes on from"):
        load_checkpoint(with_it, trainer.parts)
    assert not torch.equal(before[0], trainer.policies.learner[0])  # refused before anything is restored
    assert load_checkpoint(with_it, weights_of(trainer.policies), only=True) == 1
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.policies.learner, strict=True))


@pytest.mark.parametrize("scale", [None, 1.5])
def test_a_checkpoint_from_before_there_were_parts_loads(tmp_path: Path, scale: float | None) -> None:
    trainer = Trainer(TrainConfig(model=LORA))
    trainer.reference_control.scale = 3.0
    path = save_checkpoint(tmp_path, 3, trainer.parts)
    old: dict[str, Any] = {"iteration": 3}
    if scale is not None:
        old["reference_scale"] = scale
        old["sha256"] = hashlib.sha256(
            (path / "tensors.safetensors").read_bytes() + json.dumps(old, sort_keys=True).encode()
        ).hexdigest()
    (path / "state.json").write_text(json.dumps(old))
    kept = [parameter.detach().clone() for parameter in trainer.policies.learner]
    with torch.no_grad():
        for parameter in trainer.policies.learner:
            parameter.zero_()
    assert load_checkpoint(path, trainer.parts) == 3
    assert trainer.reference_control.scale == (scale or 1.0)
    assert all(torch.equal(a, b) for a, b in zip(kept, trainer.policies.learner, strict=True))


def test_where_there_is_no_checkpoint_there_is_no_state(trainer: Trainer, tmp_path: Path) -> None:
    (tmp_path / ".000002.partial").mkdir()
    assert load_newest(tmp_path, trainer.parts) is None


def test_a_run_goes_on_from_the_checkpoint_before_the_damaged_one(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    main(["train", "--out", str(folder), *SMALL, "--iterations", "3"])
    before = rows(folder, METRICS)
    _flip(folder / "checkpoints" / "000003" / "tensors.safetensors")
    with pytest.warns(UserWarning, match="000003 is damaged"):
        main(["eval", "--run", str(folder)])
    with pytest.warns(UserWarning, match="000003 is damaged"):
        main(["train", "--out", str(folder), "--resume"])
    assert rows(folder, METRICS) == before


@pytest.fixture
def held_out(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """The scores that evaluations will find, one after another."""
    scores: list[float] = []

    def found(self: Trainer, keep: list[int] | None = None) -> Evaluation:
        score = scores.pop(0)
        return Evaluation(score, score, {"all": score}, torch.zeros(len(keep or [0]), 3, 32, 32))

    monkeypatch.setattr(Trainer, "evaluate", found)
    yield scores


def test_the_best_checkpoint_stays_beside_the_last_ones(
    tmp_path: Path, held_out: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    held_out += [0.9, 0.2, 0.5, 0.3, 0.5, 0.1]  # the base's is the highest, and no checkpoint
    main(["train", "--out", str(folder), *SMALL, "--iterations", "5"])
    names = [path.name for path in checkpoints(folder / "checkpoints")]
    assert names == ["000002", "000004", "000005"]
    assert "best: 0.500 after iteration 2" in capsys.readouterr().out
    sample = ["sample", "--run", str(folder), "--prompt", "a red circle", "--count", "2", "--steps", "2"]
    pictures = {}
    for choice in ("best", "2", "last", "5"):
        main([*sample, "--checkpoint", choice, "--out", str(tmp_path / f"{choice}.png")])
        pictures[choice] = (tmp_path / f"{choice}.png").read_bytes()
    assert pictures["best"] == pictures["2"] != pictures["last"] == pictures["5"]
    with pytest.raises(SystemExit, match='--checkpoint is \'3\'; accepted here: "last", "best" or one of 000002, '):
        main([*sample, "--checkpoint", "3", "--out", str(tmp_path / "3.png")])


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_saved_files_have_the_ordinary_mode(trainer: Trainer, tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        path = save_checkpoint(tmp_path, 1, trainer.parts)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()} == {0o666 & ~mask}


def test_a_pretrained_pipeline_has_the_ordinary_mode(tmp_path: Path) -> None:
    settings = PretrainSettings(scenes=8, vae_steps=2, flow_stages=(FlowStage(4, 1e-3, 0.0),), batch=2)
    before = os.umask(0o022)
    try:
        pretrain(tmp_path / "pipeline", settings)
    finally:
        os.umask(before)
    saved = list((tmp_path / "pipeline").rglob("*.safetensors"))
    assert len(saved) >= 5 and {stat.S_IMODE(file.stat().st_mode) for file in saved} == {0o644}
