"""A run on random weights is a whole run, and cannot be taken for a real one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from advflow.cli import main
from advflow.dry_run.account import account
from advflow.dry_run.estimate import disk
from advflow.models.sd3 import SD3, load_pipeline, pipeline_folder
from advflow.models.sd3_structure import SD35_MEDIUM
from advflow.settings.model import ModelConfig
from advflow.settings.sources import load_run_config
from safetensors.torch import load_file

from tests.trainer.runs import SMALL, rows


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded pipeline's small files alone."""
    folder = tmp_path_factory.mktemp("pipeline") / "pipeline"
    shutil.copytree(pipeline_folder("embedded"), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


@pytest.fixture(scope="module")
def run(configs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "trial"
    words = "--model.trainable lora --model.lora_rank 4 --iterations 2 --random_weights".split()
    main(["train", *SMALL, *words, "--model.pipeline", str(configs), "--out", str(out)])
    return out


def test_it_says_so_everywhere(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert json.loads((run / "summary.json").read_text())["random_weights"] is True
    page = (run / "report.html").read_text()
    assert "<title>trial (RANDOM WEIGHTS)" in page and "RANDOM WEIGHTS: a trial without a model" in page
    for words in (["eval"], ["sample", "--prompt", "a cat", "--count", "1", "--steps", "1"], ["export"]):
        out = [] if words == ["eval"] else ["--out", str(run.parent / ("s.png" if words[0] == "sample" else "e"))]
        main([*words, "--run", str(run), *out])
        assert capsys.readouterr().out.startswith("RANDOM WEIGHTS: "), words


def test_a_real_run_does_not(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["train", *SMALL, "--iterations", "1", "--out", str(tmp_path / "run")])
    assert "RANDOM" not in capsys.readouterr().out + (tmp_path / "run/report.html").read_text()
    assert "random_weights" not in json.loads((tmp_path / "run/summary.json").read_text())
    with pytest.raises(SystemExit, match="model.random_weights is True and was False"):
        main(["train", "--out", str(tmp_path / "run"), "--resume", "--random_weights"])


def test_it_goes_on_and_its_checkpoint_is_real(run: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    shutil.copytree(run, again)
    for name in ("checkpoints/000002", "summary.json"):
        path = again / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    main(["train", "--out", str(again), "--resume"])
    assert rows(again, "metrics.jsonl")[1] == rows(run, "metrics.jsonl")[1]
    tensors = load_file(again / "checkpoints/000002/tensors.safetensors")
    assert all(
        torch.equal(each, tensors[name])
        for name, each in load_file(run / "checkpoints/000002/tensors.safetensors").items()
    )
    assert any("lora_A" in name for name in load_file(run / "checkpoints/000002/pytorch_lora_weights.safetensors"))


def test_a_dry_run_knows_the_size_of_its_checkpoint(run: Path) -> None:
    config = load_run_config(str(run))
    outline = SD3().outline(config.model)
    its = account(SD3(), outline, config.model, 1, 1)
    (_, said), *_ = disk(config, its, 1, 1)
    written = sum(each.stat().st_size for each in (run / "checkpoints/000002").iterdir())
    assert said.endswith("a checkpoint; kept are the newest 2 and the best one")
    assert float(said.split(" MB")[0]) == pytest.approx(written / 1e6, rel=0.15)  # names of tensors too


def test_its_shapes_are_the_pipelines(configs: Path) -> None:
    config = ModelConfig(pipeline=str(configs), random_weights=True)
    random, real = SD3().load(config, torch.device("cpu")), load_pipeline(ModelConfig(), torch.device("cpu"))
    own, published = random.transformer.state_dict(), real.transformer.state_dict()
    assert {name: each.shape for name, each in own.items()} == {name: each.shape for name, each in published.items()}
    assert not torch.equal(own["proj_out.weight"], published["proj_out.weight"])
    said, again = random.encode(["a", "b"]), random.encode(["b"])
    stock = SD3().load(ModelConfig(), torch.device("cpu")).encode(["a red circle", "a blue square"])
    assert said.tokens.shape == stock.tokens.shape and said.pooled.shape == stock.pooled.shape
    assert torch.equal(said.tokens[1:], again.tokens) and not torch.equal(said.tokens[0], said.tokens[1])


def test_sd35_medium_needs_no_file() -> None:
    SD3().check(ModelConfig(pipeline=SD35_MEDIUM, random_weights=True, resolution=512))
    with pytest.raises(ValueError, match="model.resolution is 24; this pipeline needs a multiple of 16"):
        SD3().check(ModelConfig(pipeline=SD35_MEDIUM, random_weights=True, resolution=24))
