"""Services that follow a run: what they are told, under which name, and that they cannot end it."""

from __future__ import annotations

import importlib.machinery
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("diffusers", reason="the trainer's dependencies are not installed")

from advflow.cli import main
from advflow.run.train import train
from advflow.settings.config import TrainConfig
from advflow.settings.data import EvalConfig
from advflow.settings.tracking import TrackingConfig

from tests.trainer.runs import SMALL, rows

Make = Callable[..., TrainConfig]


class Service(ModuleType):
    """Stands for wandb and trackio: keeps what it is told."""

    def __init__(self, name: str, breaks_at: int | None = None) -> None:
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)
        self.started: list[dict[str, Any]] = []
        self.told: list[tuple[int, dict[str, Any]]] = []
        self.finished, self._breaks_at = 0, breaks_at

    def init(self, **given: Any) -> Service:
        self.started.append(given)
        return self

    def log(self, values: dict[str, Any], step: int) -> None:
        if self._breaks_at is not None and len(self.told) >= self._breaks_at:
            raise ConnectionError("the line is dead")
        self.told.append((step, values))

    def finish(self) -> None:
        self.finished += 1

    Image = staticmethod(lambda picture: ("image", picture.size))


@pytest.fixture
def services(monkeypatch: pytest.MonkeyPatch) -> dict[str, Service]:
    found = {name: Service(name) for name in ("wandb", "trackio")}
    for name, service in found.items():
        monkeypatch.setitem(sys.modules, name, service)
    return found


def test_both_are_told_what_the_files_say(small_config: Make, services: dict[str, Service]) -> None:
    tracking = TrackingConfig(
        to=["wandb", "trackio"], project="shapes", args={"wandb": {"entity": "team", "name": "n"}}
    )
    config = small_config(iterations=2, tracking=tracking)
    train(config, resume=False)
    wandb, trackio = services["wandb"], services["trackio"]
    assert wandb.told == trackio.told and wandb.finished == trackio.finished == 1
    folder = Path(config.out)
    for row in rows(folder, "metrics.jsonl"):
        (told,) = (values for step, values in wandb.told if step == row["iteration"] + 1 and "train/reward" in values)
        assert told.keys() >= {f"train/{name}" for name in row if name != "iteration"}
        assert all(told[f"train/{name}"] == row[name] for name in row if name != "iteration" and row[name] is not None)
    for row in rows(folder, "evals.jsonl"):
        told = {"held_out/overall": row["overall"]} | {f"held_out/{k}": v for k, v in row["categories"].items()}
        assert (row["iteration"], told) in wandb.told
    assert [step for step, values in wandb.told if "held_out/samples" in values] == [0, 2]
    (of_wandb,), (of_trackio,) = wandb.started, trackio.started
    assert of_wandb["project"] == of_trackio["project"] == "shapes" and of_wandb["entity"] == "team"
    assert of_wandb["name"] == "n" and of_trackio["name"] == "run"
    assert of_wandb["config"]["rollout.images_per_prompt"] == 4 and of_wandb["dir"] == config.out
    assert "id" not in of_trackio


def test_a_run_that_goes_on_is_the_same_one_there(small_config: Make, services: dict[str, Service]) -> None:
    tracking = TrackingConfig(to=["wandb"])
    train(small_config(iterations=1, tracking=tracking), resume=False)
    train(small_config(iterations=2, tracking=tracking), resume=True)
    first, second = services["wandb"].started
    assert first["id"] == second["id"] and len(first["id"]) == 16 and second["resume"] == "allow"
    # Who is told is nothing that a run depends on.
    train(small_config(iterations=3), resume=True)
    assert len(services["wandb"].started) == 2


def test_a_service_that_breaks_ends_nothing(small_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    broken, whole = Service("wandb", breaks_at=2), Service("trackio")
    monkeypatch.setitem(sys.modules, "wandb", broken)
    monkeypatch.setitem(sys.modules, "trackio", whole)
    config = small_config(iterations=2, tracking=TrackingConfig(to=["wandb", "trackio"]))
    with pytest.warns(UserWarning, match=r"wandb is told no more of this run: ConnectionError\('the line is dead'\)"):
        train(config, resume=False)
    assert len(broken.told) == 2 and len(whole.told) == 6 and whole.finished == 1
    assert json.loads((Path(config.out) / "summary.json").read_text())["iterations"] == 2


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_missing_package_is_named_before_anything_is_written(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    out = tmp_path / "run"
    with pytest.raises(SystemExit, match=rf"tracking.to names '{name}', which is not installed: pip install {name}"):
        main(["train", "--out", str(out), *SMALL, "--tracking.to", f"[{name}]"])
    assert not out.exists()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"to": ["wandbi"]}, r"tracking.to is \['wandbi'\]; accepted: a list of wandb, trackio"),
        ({"to": ["wandb", "wandb"]}, r"accepted: a list of wandb, trackio, each once"),
        ({"to": ["wandb"], "project": ""}, r"tracking.project is ''; accepted: a name"),
        ({"to": ["wandb"], "args": {"trackio": {}}}, r"tracking.args is .*; accepted: a mapping for each"),
        ({"to": ["wandb"], "args": {"wandb": 1}}, r"tracking.args is .*; accepted: a mapping for each"),
    ],
)
def test_other_settings_are_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        TrackingConfig(**settings)


def test_every_iteration_has_its_learning_rate(small_config: Make) -> None:
    """Of the last step: risen over ten steps of warm-up, falling to 0 from half of the run on."""
    config = small_config(iterations=4, evaluation=EvalConfig(every=4, steps=1, prompts_per_category=1))
    train(config, resume=False)
    found = [row["lr"] / config.optim.lr for row in rows(Path(config.out), "metrics.jsonl")]
    assert found == pytest.approx([0.1, 0.2, 0.3, 0.4])
