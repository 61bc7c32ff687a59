"""Built-in recipes pass a dry run where what they name is there, and name all of it where it is not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from advflow.cli import main
from advflow.models.sd3_structure import SD35_MEDIUM, published_sizes
from advflow.settings.registry import METHODS
from advflow.settings.sources import algorithm_settings, resolve_configs, to_config, train_parser

PROMPTS = {
    "geneval": '{"tag": "single_object", "include": [{"class": "cow", "count": 1}], "prompt": "a photo of a cow %d"}',
    "pickscore": "a photo of a cow %d",
    "several": "a photo of a cow %d",
    "ocr": 'a sign that says "open %d"',
}
NEEDED = {
    "geneval": ["facebook/mask2former-swin-small-coco-instance", "openai/clip-vit-large-patch14"],
    "pickscore": ["yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"],
    "several": [
        "openai/clip-vit-large-patch14",
        "HPS_v2.1_compressed.pt --local-dir models",
        "yuvalkirstain/PickScore_v1",
    ],
    "ocr": [],
}


def config_of(*words: str) -> object:
    parser = train_parser()
    parsed = parser.parse_args(resolve_configs(["train", *words])[1:])
    for name in ("config", "resume", "dry_run", "random_weights"):
        parsed.pop(name)
    return to_config(parser, parsed)


def stand_ins(folder: Path, recipe: str) -> str:
    """Every file that the recipe names, empty where it is large; returns the folder of a pipeline of two blocks."""
    pipeline = folder / "pipeline"
    shutil.copytree(published_sizes(SD35_MEDIUM) or "", pipeline)
    for part, settings in (
        ("transformer", {"num_layers": 2, "dual_attention_layers": [0]}),
        ("vae", {"block_out_channels": [32, 32, 32, 32], "layers_per_block": 1}),
        ("text_encoder", {"num_hidden_layers": 1}),
        ("text_encoder_2", {"num_hidden_layers": 1}),
        ("text_encoder_3", {"num_layers": 1}),
    ):
        config = pipeline / part / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | settings))
        diffusers = part in ("transformer", "vae")
        (pipeline / part / f"{'diffusion_pytorch_' if diffusers else ''}model.safetensors").touch()
    data = config_of("--config", "sd35_medium", "--config", recipe).data  # type: ignore[attr-defined]
    for path in (data.prompts, data.eval_prompts):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text("\n".join(PROMPTS[recipe] % number for number in range(64)))
    for name in ("facebook/mask2former-swin-small-coco-instance", "openai/clip-vit-large-patch14",
                 "yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"):  # fmt: skip
        repository = folder / "hub" / f"models--{name.replace('/', '--')}"
        snapshot = repository / "snapshots" / "0"
        snapshot.mkdir(parents=True)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0")
        for file in ("config.json", "model.safetensors", "preprocessor_config.json"):
            (snapshot / file).touch()
    (folder / "models").mkdir()
    (folder / "models" / "HPS_v2.1_compressed.pt").touch()
    for module in ("open_clip", "rapidocr", "onnxruntime"):
        (folder / f"{module}.py").touch()
    return str(pipeline)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("recipe", list(PROMPTS))
def test_a_recipe_passes_a_dry_run(recipe: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--config", "sd35_medium", "--config", recipe, "--model.pipeline", stand_ins(here, recipe)]
    main(["train", "--dry_run", *words])
    assert capsys.readouterr().out.splitlines()[-1] == "ready"


@pytest.mark.parametrize("recipe", list(PROMPTS))
def test_what_a_recipe_lacks_is_named(
    recipe: str, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("advflow.dry_run.dry_run._estimate", lambda *_: None)  # it takes a while
    with pytest.raises(SystemExit) as caught:
        main(["train", "--dry_run", "--config", "sd35_medium", "--config", recipe])
    assert caught.value.code == 1
    text = " ".join(capsys.readouterr().out.split())
    for name in [*NEEDED[recipe], SD35_MEDIUM, "train", "test"]:
        assert name in text.partition("missing or wrong")[2], name
    folder = "pickscore" if recipe == "several" else recipe
    assert f"is dataset/{folder}/test" in text and "github.com/yifan123/flow_grpo" in text


def test_what_a_recipe_sets_for_a_method_goes_with_the_methods_own_settings() -> None:
    pairs = [
        (recipe, algorithm) for recipe in PROMPTS for algorithm in METHODS if algorithm_settings(recipe, algorithm)
    ]
    assert len(pairs) == 9
    for recipe, algorithm in pairs:
        config_of("--config", "sd35_medium", "--config", recipe, "--algorithm", algorithm)
