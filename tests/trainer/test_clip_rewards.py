"""Rewards that are CLIP models, on one with random weights: what they load, what they compute and what they refuse."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from advflow.rewards import Prompt, load_reward
from advflow.rewards.images import eight_bit, pictures
from safetensors.torch import save_file
from torch.nn import functional
from transformers import CLIPModel, CLIPProcessor

from tests.trainer.reward_models import save_clip

TEXTS = ["a red circle", "two squares", "a circle above a square"]
PROMPTS = [Prompt(text) for text in TEXTS]
IMAGES = torch.rand(3, 3, 32, 24, generator=torch.Generator().manual_seed(1))
WIDTHS = {0: (768, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}  # as numbered in the published file


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_clip(tmp_path_factory.mktemp("clip"), width=768)


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The aesthetic predictor's network with random weights, as torch.save writes it."""
    generator = torch.Generator().manual_seed(3)
    weights: dict[str, torch.Tensor] = {}
    for number, (width, following) in WIDTHS.items():
        weights[f"layers.{number}.weight"] = torch.randn(following, width, generator=generator) / width**0.5
        weights[f"layers.{number}.bias"] = torch.randn(following, generator=generator)
    path = tmp_path_factory.mktemp("head") / "sac+logos+ava1-l14-linearMSE.pth"
    torch.save(weights, path)
    return path


def embeddings(folder: str) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Of images and texts, by transformers' own forward pass; and the model's scale."""
    inputs = CLIPProcessor.from_pretrained(folder)(
        images=pictures(IMAGES), text=TEXTS, padding=True, truncation=True, return_tensors="pt"
    )
    model = CLIPModel.from_pretrained(folder)
    with torch.no_grad():
        output = model(**inputs)
    return output.image_embeds, output.text_embeds, model.logit_scale.exp().item()


@pytest.mark.parametrize("name", ["pickscore", "clipscore"])
def test_scores_are_scaled_cosines(folder: str, name: str) -> None:
    arguments = {"model": folder} | ({"processor": folder} if name == "pickscore" else {})
    reward = load_reward(name, arguments)
    scores = reward(IMAGES, PROMPTS)
    images, texts, scale = embeddings(folder)
    expected = (images * texts).sum(1) * (scale / 26 if name == "pickscore" else 1.0)
    torch.testing.assert_close(scores.reward, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(scores.reward, scores.score)
    alone = torch.cat([reward(IMAGES[i : i + 1], PROMPTS[i : i + 1]).reward for i in range(3)])
    torch.testing.assert_close(scores.reward, alone, rtol=1e-4, atol=1e-5)


def test_aesthetic_is_the_networks_rating_of_the_embedding(folder: str, head: Path, tmp_path: Path) -> None:
    weights = torch.load(head, weights_only=True)
    rating = embeddings(folder)[0]
    for number in WIDTHS:
        rating = functional.linear(rating, weights[f"layers.{number}.weight"], weights[f"layers.{number}.bias"])
    save_file(weights, tmp_path / "head.safetensors")
    for path in (head, tmp_path / "head.safetensors"):
        scores = load_reward("aesthetic", {"weights": str(path), "model": folder})(IMAGES, PROMPTS)
        torch.testing.assert_close(scores.reward, rating.squeeze(1), rtol=1e-4, atol=1e-5)


class Code:
    def __reduce__(self) -> Any:
        return print, ("code that was unpickled",)


def _files(folder: Path) -> Iterator[tuple[str, str]]:
    """Files that hold no weights of the aesthetic predictor, and what is said of them."""
    yield str(folder / "nowhere.pth"), ", where there is no file"
    torch.save(Code(), folder / "code.pth")
    yield str(folder / "code.pth"), ", which holds no weights alone: "
    (folder / "text.safetensors").write_text("not weights")
    yield str(folder / "text.safetensors"), ", which holds no weights alone: "
    torch.save([1, 2], folder / "list.pth")
    yield str(folder / "list.pth"), "; accepted is a file of tensors by name"
    torch.save({"layers.0.weight": torch.ones(2, 2)}, folder / "other.pth")
    yield (
        str(folder / "other.pth"),
        ", which has other weights than the model: 10 differ, such as 0.bias of shape None where [1024] belongs",
    )


def test_weights_that_are_none_are_named_and_no_code_is_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path, problem in _files(tmp_path):
        with pytest.raises(ValueError) as caught:
            load_reward("aesthetic", {"weights": path}, arguments_place="data.reward.beauty.args")
        assert str(caught.value).startswith(f"data.reward.beauty.args.weights is {path!r}{problem}")
    assert "unpickled" not in capsys.readouterr().out


def test_two_thousand_images_never_go_through_one_forward_pass(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    forward = CLIPModel.from_pretrained(folder).vision_model.__class__.forward

    def counting(self: torch.nn.Module, pixel_values: torch.Tensor, **rest: Any) -> Any:
        seen.append(len(pixel_values))
        return forward(self, pixel_values=pixel_values, **rest)

    monkeypatch.setattr("transformers.models.clip.modeling_clip.CLIPVisionModel.forward", counting)
    images = torch.rand(1, 3, 16, 16).expand(2048, 3, 16, 16)
    scores = load_reward("clipscore", {"model": folder})(images, [PROMPTS[0]] * 2048)
    assert scores.reward.shape == (2048,) and seen == [64] * 32
    seen.clear()
    load_reward("clipscore", {"model": folder}, batch=48)(images[:100], [PROMPTS[0]] * 100)
    assert seen == [48, 48, 4]


def test_hpsv2_is_the_cosine_of_open_clips_features(tmp_path: Path) -> None:
    open_clip = pytest.importorskip("open_clip", reason='open_clip is not installed: pip install "./python[hpsv2]"')
    sizes = {"width": 32, "layers": 1}
    config = {
        "embed_dim": 16,
        "vision_cfg": sizes | {"image_size": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": sizes | {"context_length": 77, "vocab_size": 49408, "heads": 2},
    }
    (tmp_path / "tiny-hps.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "tiny-hps.json")
    torch.manual_seed(0)
    model = open_clip.create_model("tiny-hps", output_dict=True).eval()
    torch.save({"epoch": 1, "state_dict": model.state_dict()}, tmp_path / "HPS_v2.1_compressed.pt")
    reward = load_reward("hpsv2", {"checkpoint": str(tmp_path / "HPS_v2.1_compressed.pt"), "architecture": "tiny-hps"})
    scores = reward(IMAGES, PROMPTS)
    black = torch.zeros(3, 3, 32, 32)
    black[..., 4:28] = IMAGES  # as high as the model's images, and in their middle
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (model.visual.image_mean, model.visual.image_std))
    with torch.no_grad():
        features = model((black - mean) / std, open_clip.get_tokenizer("tiny-hps")(TEXTS))
    expected = (features["image_features"] * features["text_features"]).sum(1)
    torch.testing.assert_close(scores.reward, expected)


def test_images_for_files_have_eight_bits() -> None:
    images = torch.tensor([0.0, 0.5, 1.0]).view(1, 3, 1, 1).expand(1, 3, 2, 4)
    assert eight_bit(images).dtype == torch.uint8 and eight_bit(images)[0, :, 0, 0].tolist() == [0, 128, 255]
    (picture,) = pictures(images)
    assert picture.size == (4, 2) and picture.getpixel((3, 1)) == (0, 128, 255)
