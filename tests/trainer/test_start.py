"""What can be checked is checked before a model is loaded, said in one sentence, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from advflow.algorithms import check_settings
from advflow.cli import main
from advflow.core import provenance
from advflow.core.device import pick_device
from advflow.models.sd3 import SD3, SD3Latents, load_pipeline, pipeline_folder
from advflow.rewards import Prompt, Scores
from advflow.settings.methods import FlowGRPOConfig
from advflow.settings.model import ModelConfig
from advflow.settings.registry import METHODS

from tests.trainer.runs import SMALL


class Loaded(Exception):
    pass


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets everything that loads a model say so instead."""

    def load(*_: object) -> None:
        raise Loaded

    monkeypatch.setattr(SD3, "load", load)


class Reward:
    def __call__(self, images: torch.Tensor, prompts: list[Prompt]) -> Scores:
        red = images[:, 0].mean((1, 2)).cpu()
        return Scores(red, red)


class RaisesWhenMade(Reward):
    def __init__(self) -> None:
        raise ValueError("the weights of this reward are elsewhere")


class RaisesWhenAsked(Reward):
    def __call__(self, images: torch.Tensor, prompts: list[Prompt]) -> Scores:
        raise ValueError("this reward does not know what to say")


def _refused(words: list[str]) -> str:
    """The one sentence with which a command ends."""
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code not in (0, None)
    sentence = str(caught.value)
    assert "\n" not in sentence.strip()
    return sentence


@pytest.fixture
def three(tmp_path: Path) -> str:
    path = tmp_path / "three.txt"
    path.write_text("a red circle\na blue square\na green triangle\n")
    return str(path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data.prompts", "nowhere.txt"], "data.prompts is 'nowhere.txt'"),
        (["--data.eval_prompts", "nowhere.txt"], "data.eval_prompts is 'nowhere.txt'"),
        (["--data.prompts", "{three}", "--rollout.prompts", "4"], "rollout.prompts is 4; data.prompts has only 3"),
        (["--rollout.prompts", "100000"], "rollout.prompts is 100000; data.prompts has only"),
        (["--data.reward", "beauty"], "data.reward is 'beauty'"),
        (["--data.reward", "no.such:Thing"], "data.reward 'no.such:Thing'"),
        (["--data.reward", f"{__name__}:Missing"], "Missing"),
        (["--optim.steps_per_iteration", "3"], "optim.steps_per_iteration is 3"),
        (["--optim.lr", "1e300"], "optim.lr is 1e[+]?300"),
        (["--algorithm", "flow_grpo", "--sde.steps", "10"], "sde.steps is 10"),
        (["--model.resolution", "33"], "model.resolution is 33; this pipeline needs a multiple of 4"),
        (["--model.pipeline", "{here}"], "model.pipeline is '.*'; accepted: \"embedded\", the folder of"),
        (["--model.pipeline", "nobody/has-such-a-model"], "model.pipeline is 'nobody/has-such-a-model'; accepted"),
        (["--device", "cuda:99"], "device is 'cuda:99', and torch .* finds . usable CUDA devices here"),
        (["--device", "meta"], 'device is \'meta\'; accepted: "auto", "cpu", "cuda" or "cuda:N"'),
        (["--device", "warp9"], "device is 'warp9'; accepted"),
        (["--out", "{file}"], "out is '.*', which is a file; accepted is a folder"),
        (["--out", "{file}/below/it"], "out is '.*', which is below '.*', a file"),
        (["--out", ""], "out is empty"),
    ],
)
def test_a_mistake_is_seen_before_a_model_is_loaded(
    no_model: None,
    three: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    message: str,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "file"
    file.write_text("kept")
    before = sorted(tmp_path.rglob("*"))
    places = {"three": three, "file": str(file), "here": str(tmp_path)}
    sentence = _refused(["train", "--out", str(tmp_path / "run"), *(word.format(**places) for word in words)])
    assert re.search(message, sentence), sentence
    assert sorted(tmp_path.rglob("*")) == before and file.read_text() == "kept"


def test_without_cuda_the_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for name in ("cuda", "cuda:0"):
        with pytest.raises(ValueError, match=rf"device is '{name}', and torch .* finds 0 usable CUDA devices"):
            pick_device(name)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [pick_device(name) for name in ("cuda", "cuda:1")] == [torch.device("cuda"), torch.device("cuda:1")]
    with pytest.raises(ValueError, match="device is 'cuda:2', and torch .* finds 2"):
        pick_device("cuda:2")


def test_a_folder_without_leave_to_write_is_refused(no_model: None, tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    if os.access(tmp_path / "closed", os.W_OK):
        pytest.skip("this user may write anywhere")
    assert "cannot be written to" in _refused(["train", "--out", str(tmp_path / "closed" / "run")])


def test_a_start_that_fails_while_loading_leaves_nothing(no_model: None, tmp_path: Path) -> None:
    with pytest.raises(Loaded):
        main(["train", "--out", str(tmp_path / "below" / "run"), *SMALL])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["RaisesWhenMade", "RaisesWhenAsked"])
def test_what_a_reward_of_ones_own_raises_keeps_its_traceback(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="this reward"):
        main(["train", "--out", str(tmp_path / "run"), *SMALL, "--data.reward", f"{__name__}:{name}"])
    assert (tmp_path / "run").exists() == (name == "RaisesWhenAsked")


def test_what_a_model_raises_keeps_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> Any:
        return json.loads("not JSON")  # a ValueError raised in a library

    monkeypatch.setattr("advflow.processes.forward.sample_latents", fails)
    monkeypatch.setattr("advflow.run.drawing.sample_latents", fails)
    with pytest.raises(json.JSONDecodeError):
        main(["train", "--out", str(tmp_path / "run"), *SMALL])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start") / "run"
    main(["train", "--out", str(folder), *SMALL, "--iterations", "1"])
    return folder


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--count", "0"], "--count is 0; accepted: 1 or more"),
        (["--count", "-3"], "--count is -3; accepted: 1 or more"),
        (["--steps", "0"], "--steps is 0; accepted: 1 or more"),
        (
            ["--out", "picture.txt"],
            "--out is 'picture.txt'; accepted is a file ending in .png, .jpg, .jpeg, .webp, .bmp",
        ),
        (["--out", "picture"], "--out is 'picture'; accepted is a file ending in"),
        (
            ["--out", "nowhere/picture.png"],
            "--out is 'nowhere/picture.png'; accepted is a file in a folder that exists",
        ),
        (["--checkpoint", "7"], '--checkpoint is \'7\'; accepted here: "last", "best" or one of 000001'),
        (["--checkpoint", "first"], "--checkpoint is 'first'"),
    ],
)
def test_a_sample_that_cannot_be_is_refused_before_work(
    no_model: None, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in _refused(["sample", "--run", str(run), "--prompt", "a red circle", *words])
    assert list(tmp_path.iterdir()) == []


def test_a_run_without_a_checkpoint_is_refused_before_work(no_model: None, run: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes((run / "config.yaml").read_bytes())
    for command in (["eval"], ["sample", "--prompt", "a red circle"]):
        assert "has no checkpoint yet; --base uses" in _refused([*command, "--run", str(tmp_path)])


def test_every_picture_ending_works(run: Path, tmp_path: Path) -> None:
    sample = ["sample", "--run", str(run), "--prompt", "a red circle", "--steps", "1"]
    for ending in ("png", "jpg", "JPEG", "webp", "bmp"):
        main([*sample, "--count", "1", "--out", str(tmp_path / f"one.{ending}")])
        assert (tmp_path / f"one.{ending}").stat().st_size > 0


def test_the_pretrained_folder_is_checked_before_work(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("kept")
    assert "which is a file" in _refused(["pretrain", "--out", str(file)])
    assert "batch is 0; accepted: 1 or more" in _refused(["pretrain", "--out", str(tmp_path / "new"), "--batch", "0"])
    assert not (tmp_path / "new").exists() and file.read_text() == "kept"


def test_a_pipeline_of_another_kind_is_named(tmp_path: Path) -> None:
    folder = shutil.copytree(pipeline_folder("embedded"), tmp_path / "pipeline")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "FluxPipeline"}))
    words = ["train", "--out", str(tmp_path / "run"), "--model.pipeline", str(folder)]
    assert "a FluxPipeline; accepted: a StableDiffusion3Pipeline" in _refused(words)


def test_a_pipeline_without_its_weights_is_named(tmp_path: Path) -> None:
    folder = shutil.copytree(pipeline_folder("embedded"), tmp_path / "pipeline")
    next((folder / "transformer").glob("*.safetensors")).unlink()
    words = ["train", "--out", str(tmp_path / "run"), "--model.pipeline", str(folder)]
    assert "which cannot be loaded: " in _refused(words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("module", ["advflow", "advflow.cli"])
def test_the_module_is_the_command(module: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", module, "train", "--optim.lr", "0"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode != 0 and "optim.lr is 0" in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def _git(folder: Path, *words: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    command = ["git", "-C", str(folder), *identity, *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_a_commit_is_claimed_only_where_the_file_is_tracked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment inside somebody's repository holds our files, but its commits say nothing about them."""
    monkeypatch.delenv("ADVFLOW_COMMIT", raising=False)
    _git(tmp_path, "init", "-q")
    (tmp_path / "theirs.py").write_text("")
    _git(tmp_path, "add", "theirs.py")
    _git(tmp_path, "commit", "-q", "-m", "theirs")
    installed = tmp_path / ".venv" / "advflow"
    installed.mkdir(parents=True)
    (installed / "provenance.py").write_text("")
    assert provenance.commit(str(installed / "provenance.py")) is None
    _git(tmp_path, "add", "-f", ".")
    _git(tmp_path, "commit", "-q", "-m", "ours")
    assert provenance.commit(str(installed / "provenance.py")) == _git(tmp_path, "rev-parse", "--short=12", "HEAD")
    assert provenance.commit(str(tmp_path.parent / "provenance.py")) is None


def test_the_environment_names_the_commit_of_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADVFLOW_COMMIT", "0123abc")
    assert provenance.commit() == "0123abc"


def test_a_package_that_is_not_installed_has_no_version_and_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(name: str) -> str:
        raise provenance.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(provenance.metadata, "version", missing)
    assert provenance.versions()["torch"] == "unknown"
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0 and "unknown (advflow-ext unknown, torch unknown, Python" in capsys.readouterr().out


def test_the_embedded_pipeline_passes_its_own_check() -> None:
    SD3().check(ModelConfig())
    pipeline = load_pipeline(ModelConfig(), torch.device("cpu"))
    for resolution in (30, 34):
        config = ModelConfig(resolution=resolution)
        for check in (lambda: SD3().check(config), lambda: SD3Latents(pipeline, config)):  # noqa: B023
            with pytest.raises(
                ValueError, match=rf"model.resolution is {resolution}; this pipeline needs a multiple of"
            ):
                check()


@pytest.mark.parametrize(
    ("algorithm", "option", "sentence"),
    [
        ("flow_grpo", "--flow_grpo.clip=1.5", "flow_grpo.clip is 1.5; accepted is a number of at least 0 and below 1."),
        ("dance_grpo", "--flow_grpo.clip=-1", "flow_grpo.clip is -1.0; accepted is a finite number of at least 0 and"),
        ("grpo_guard", "--grpo_guard.kl_weight=-1", "grpo_guard.kl_weight is -1.0; accepted is a finite number of at"),
        ("flow_cps", "--flow_cps.clip=1", "flow_cps.clip is 1.0; accepted is a number of at least 0 and below 1."),
        ("flow_dppo", "--flow_dppo.mask=predictive", "flow_dppo.step_size is None; accepted is a finite number above"),
        ("flow_dppo", "--flow_dppo.step_size=1", "flow_dppo.step_size is 1.0; accepted with mask 'current' is None."),
        (
            "advantage_flow",
            "--advantage_flow.beta=0",
            "advantage_flow.beta is 0.0; accepted is a finite number above",
        ),
        ("diffusion_nft", "--diffusion_nft.adv_clip_max=0", "diffusion_nft.adv_clip_max is 0.0; accepted is a finite"),
        ("awm", "--awm.power=0", "awm.power is 0.0; accepted is a finite number above 0."),
        (
            "flow_awr",
            "--flow_awr.kl_weight=-1",
            "flow_awr.kl_weight is -1.0; accepted is a finite number of at",
        ),
        ("reward_weighted", "--reward_weighted.tau=0", "reward_weighted.tau is 0.0; accepted is a finite number above"),
    ],
)
def test_what_the_op_refuses_is_refused_before_anything_exists(
    algorithm: str, option: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("advflow.run.train.Trainer", lambda *_: pytest.fail("made a trainer"))
    folder = tmp_path / "run"
    with pytest.raises(SystemExit, match=re.escape(sentence)):
        main(["train", "--algorithm", algorithm, option, "--out", str(folder)])
    assert not folder.exists()


def test_what_the_op_takes_is_taken() -> None:
    """A clip of 0 leaves every ratio that has moved its bound."""
    for algorithm, method in METHODS.items():
        check_settings(algorithm, method.settings(), group_size=8)  # type: ignore[misc]
    check_settings("flow_grpo", FlowGRPOConfig(clip=0.0), group_size=8)
