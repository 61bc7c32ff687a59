"""A run that starts from an adapter: of a run of ours, of diffusers, of PEFT; and what does not fit is named."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from advflow.algorithms.batch import Needs
from advflow.cli import main
from advflow.models.adapters import read_adapter
from advflow.models.sd3 import SD3, load_pipeline
from advflow.policies import make_policies, policy_velocities
from advflow.run.inference import draw_images, load_run
from advflow.run.log import METRICS
from advflow.settings.model import ModelConfig, RuntimeConfig
from advflow.settings.sources import load_run_config
from diffusers import StableDiffusion3Pipeline
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from tests.trainer.runs import SMALL, rows

PROMPT = "a red circle"
LORA = "--model.trainable lora --model.lora_rank 4 --model.lora_alpha 12 --optim.lr 0.05 --optim.warmup 1".split()
CONFIG = ModelConfig(trainable="lora", lora_rank=4, lora_alpha=12)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """What a run has exported, and images of that run."""
    folder = tmp_path_factory.mktemp("tuned")
    main(["train", "--out", str(folder / "run"), *SMALL, "--iterations", "1", *LORA])
    main(["export", "--run", str(folder / "run"), "--out", str(folder / "tuned")])
    images = draw_images(load_run(folder / "run", load_run_config(str(folder / "run")), base=False), PROMPT, 3, 4, 5)
    return folder / "tuned", images


@pytest.fixture(scope="module")
def started(tuned: tuple[Path, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one iteration that started from a copy of it, which is gone by now."""
    folder = tmp_path_factory.mktemp("started")
    start = shutil.copytree(tuned[0], folder / "start")
    main(["train", "--out", str(folder / "run"), *SMALL, "--iterations", "1", *LORA, "--model.lora_start", str(start)])
    start.rename(folder / "elsewhere")
    return folder / "run"


def test_a_run_goes_on_from_another_ones_export(
    tuned: tuple[Path, torch.Tensor], started: Path, tmp_path: Path
) -> None:
    config = load_run_config(str(started))
    again = replace(config, model=replace(config.model, lora_start=str(tuned[0])))
    images = draw_images(load_run(started, again, base=True), PROMPT, 3, 4, 5)
    torch.testing.assert_close(images, tuned[1], rtol=0, atol=1e-3)
    untrained = draw_images(load_run(started, replace(again, model=CONFIG), base=True), PROMPT, 3, 4, 5)
    assert (untrained - images).abs().max() > 5e-3
    first = rows(started, METRICS)[0]
    assert first["rollout_deviation"] == 0 and first["reference_deviation"] > 0


def test_a_run_needs_its_start_no_more(started: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(started, tmp_path / "run")
    main(["train", "--out", str(folder), "--resume", "--iterations", "2"])
    assert [row["iteration"] for row in rows(folder, METRICS)] == [0, 1]
    with pytest.raises(SystemExit, match=r"advflow eval: model.lora_start is '.*', where there is nothing; accepted: "):
        main(["eval", "--run", str(folder), "--base"])
    with pytest.raises(SystemExit, match="model.lora_start is 'x' and was '.*start'; --resume may change"):
        main(["train", "--out", str(folder), "--resume", "--model.lora_start", "x"])


def _random_peft_model(rank: int = 4, **changes: Any) -> PeftModel:
    """As flow_grpo, DiffusionNFT and Flow-Factory make it, with weights that show."""
    torch.manual_seed(3)
    settings = {"r": rank, "lora_alpha": 12, "target_modules": list(SD3.lora_targets), "init_lora_weights": "gaussian"}
    model = get_peft_model(
        load_pipeline(ModelConfig(), torch.device("cpu")).transformer, LoraConfig(**(settings | changes))
    )
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def of_peft(tmp_path_factory: pytest.TempPathFactory) -> tuple[PeftModel, Path]:
    folder = tmp_path_factory.mktemp("peft")
    model = _random_peft_model()
    model.save_pretrained(folder)
    return model, folder


@pytest.mark.parametrize("form", ["peft", "peft file", "diffusers"])
@torch.no_grad()
def test_every_form_gives_its_own_velocity(form: str, of_peft: tuple[PeftModel, Path], tmp_path: Path) -> None:
    theirs, folder = of_peft
    place = folder if form == "peft" else folder / "adapter_model.safetensors"
    if form == "diffusers":
        weights = {name.removeprefix("base_model.model."): value for name, value in load_file(place).items()}
        metadata = {"r": 4, "lora_alpha": 12, "target_modules": list(SD3.lora_targets)}
        place = tmp_path
        StableDiffusion3Pipeline.save_lora_weights(place, weights, transformer_lora_adapter_metadata=metadata)
    pipeline, family = load_pipeline(ModelConfig(), torch.device("cpu")), SD3()
    config = replace(CONFIG, lora_start=str(place))
    policies = make_policies(family, pipeline.transformer, config, RuntimeConfig(), 0, read_adapter(config))
    told = family.load(ModelConfig(), torch.device("cpu")).encode([PROMPT])
    x, t = _latents(pipeline), torch.tensor([0.7])
    v, v_old, v_ref = policy_velocities(policies, Needs(old=True, reference=True), x, t, told)
    torch.testing.assert_close(v, family.velocity(theirs, x, t * 1000, told), rtol=0, atol=3e-5)
    with theirs.disable_adapter():
        torch.testing.assert_close(v_ref, family.velocity(theirs, x, t * 1000, told), rtol=0, atol=3e-5)
    assert v_old is not None and v_ref is not None
    assert torch.equal(v, v_old) and (v - v_ref).abs().max() > 1e-2


def _latents(pipeline: StableDiffusion3Pipeline) -> torch.Tensor:
    side = 32 // pipeline.vae_scale_factor
    return torch.randn(1, pipeline.transformer.config.in_channels, side, side)


def _edit_weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        weights = load_file(path)
        change(weights)
        save_file(weights, path)

    return edit


def _edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


FIRST = "base_model.model.transformer_blocks.0.attn.to_q.lora_A.weight"
SHORT = FIRST.removeprefix("base_model.model.")
FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (_edit_weights(lambda w: w.pop(FIRST)), rf"does not fit: it has no {SHORT} \(1 missing\); accepted are"),
    "extra": (
        _edit_weights(lambda w: w.update({"text_encoder.q.lora_A.weight": torch.zeros(4, 2)})),
        r"it has text_encoder.q.lora_A.weight, which the model has not \(1 unknown\)",
    ),
    "misshapen": (
        _edit_weights(lambda w: w.update({FIRST: torch.zeros(4, 3)})),
        rf"does not fit: its {SHORT} is \(4, 3\), the model's \(4, \d+\)",
    ),
    "rank": (
        _edit_weights(lambda w: w.update({FIRST: torch.zeros(8, 64)})),
        f"model.lora_rank is 4; model.lora_start is '.*', whose {SHORT} has rank 8",
    ),
    "kohya": (
        _edit_weights(lambda w: (w.clear(), w.update({"lora_unet_q.lora_down.weight": torch.zeros(4, 2)}))),
        "holds no LoRA as diffusers and PEFT name it, but lora_unet_q.lora_down.weight",
    ),
    "alpha": (_edit_config(lora_alpha=8), "model.lora_alpha is 12; model.lora_start is '.*', which has alpha 8"),
    "one alpha": (_edit_config(alpha_pattern={"to_q": 3}), "model.lora_alpha is 12; .*, which has alpha 3, 12"),
    "no alpha": (
        lambda folder: (folder / "adapter_config.json").unlink(),
        "model.lora_alpha is 12; .*, which names no alpha, so that it is the rank",
    ),
    "dora": (_edit_config(use_dora=True), "an adapter with use_dora; accepted: plain LoRA"),
    "rslora": (_edit_config(use_rslora=True), "an adapter with use_rslora"),
    "pissa": (_edit_config(init_lora_weights="pissa_niter_4"), "an adapter with init_lora_weights pissa_niter_4"),
    "lokr": (_edit_config(peft_type="LOKR"), "an adapter with peft_type LOKR"),
    "half a config": (
        lambda folder: (folder / "adapter_config.json").write_text("{"),
        "adapter_config.json cannot be read",
    ),
    "half a file": (
        lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"half"),
        "adapter_model.safetensors cannot be read",
    ),
    "no file": (
        lambda folder: (folder / "adapter_model.safetensors").unlink(),
        "which holds .*; accepted: a .safetensors",
    ),
    "pickle": (
        lambda folder: (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin"),
        "which holds README.md, adapter_config.json, adapter_model.bin; accepted: a .safetensors file, or a ",
    ),
}


@pytest.fixture(scope="module")
def with_adapter() -> Any:
    """A transformer with an adapter of CONFIG."""
    transformer = load_pipeline(ModelConfig(), torch.device("cpu")).transformer
    lora = LoraConfig(r=CONFIG.lora_rank, lora_alpha=CONFIG.lora_alpha, target_modules=list(SD3.lora_targets))
    transformer.add_adapter(lora, adapter_name="learner")
    return transformer


@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_fit_is_named(
    fault: str, of_peft: tuple[PeftModel, Path], with_adapter: Any, tmp_path: Path
) -> None:
    folder = shutil.copytree(of_peft[1], tmp_path / "start")
    break_it, sentence = FAULTS[fault]
    break_it(folder)
    before = {name: weight.clone() for name, weight in with_adapter.named_parameters()}
    with pytest.raises(ValueError, match="^model.lora_(start|rank|alpha) is ") as caught:
        adapter = read_adapter(replace(CONFIG, lora_start=str(folder)))
        assert adapter is not None
        adapter.load_into(with_adapter, "learner")
    assert re.search(sentence, str(caught.value)), str(caught.value)
    assert all(torch.equal(weight, before[name]) for name, weight in with_adapter.named_parameters())


def test_a_start_that_does_not_fit_leaves_nothing(of_peft: tuple[PeftModel, Path], tmp_path: Path) -> None:
    words = ["train", "--out", str(tmp_path / "run"), *SMALL, *LORA, "--model.lora_start", str(of_peft[1])]
    for more, sentence in (
        (["--model.lora_rank", "5"], "model.lora_rank is 5; model.lora_start is .* has rank 4"),
        (["--model.lora_targets", "[attn.to_q]"], "which does not fit: it has .* which the model has not"),
    ):
        with pytest.raises(SystemExit, match=f"advflow train: .*{sentence}"):
            main([*words, *more])
    assert list(tmp_path.iterdir()) == []


def test_the_targets_of_the_file_are_named(of_peft: tuple[PeftModel, Path], with_adapter: Any) -> None:
    adapter = read_adapter(replace(CONFIG, lora_start=str(of_peft[1])))
    assert adapter is not None and adapter.targets == sorted(SD3.lora_targets)
    fewer = replace(adapter, weights={name: weight for name, weight in adapter.weights.items() if "to_q" in name})
    with pytest.raises(
        ValueError, match=r"accepted are the adapters of model.lora_targets, and the file's are \['attn.ad"
    ):
        fewer.load_into(with_adapter, "learner")


def test_all_weights_start_from_no_adapter() -> None:
    with pytest.raises(ValueError, match="model.lora_start is 'x'; accepted: null, or model.trainable lora"):
        ModelConfig(trainable="full", lora_start="x")
