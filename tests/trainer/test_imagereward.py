"""ImageReward, on random weights by the published names: against the published network written out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from advflow.rewards import Prompt, load_reward
from advflow.rewards.images import pictures
from torch.nn import functional
from transformers import BertTokenizer, CLIPImageProcessor

PATCH, SIZE, WIDTH, TEXT_WIDTH, LAYERS, WORDS = 16, 32, 128, 64, 2, 32
HEAD = {0: (TEXT_WIDTH, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"a red circle two squares above blue triangle".split()]
TEXTS = ["a red circle", "two squares above a blue triangle", "a"]
PROMPTS = [Prompt(text) for text in TEXTS]
IMAGES = torch.rand(3, 3, 40, 40, generator=torch.Generator().manual_seed(1))

Weights = dict[str, torch.Tensor]


def random_weights() -> Weights:
    generator = torch.Generator().manual_seed(0)
    weights: Weights = {}

    def make(name: str, *shape: int) -> None:
        weights[name] = torch.randn(*shape, generator=generator) * 0.2

    def linear(name: str, width: int, following: int) -> None:
        make(f"{name}.weight", following, width)
        make(f"{name}.bias", following)

    def norm(name: str, width: int) -> None:
        make(f"{name}.weight", width)
        make(f"{name}.bias", width)

    see, read = "blip.visual_encoder", "blip.text_encoder"
    make(f"{see}.cls_token", 1, 1, WIDTH)
    make(f"{see}.pos_embed", 1, (SIZE // PATCH) ** 2 + 1, WIDTH)
    make(f"{see}.patch_embed.proj.weight", WIDTH, 3, PATCH, PATCH)
    make(f"{see}.patch_embed.proj.bias", WIDTH)
    norm(f"{see}.norm", WIDTH)
    make(f"{read}.embeddings.word_embeddings.weight", WORDS, TEXT_WIDTH)
    make(f"{read}.embeddings.position_embeddings.weight", 40, TEXT_WIDTH)
    norm(f"{read}.embeddings.LayerNorm", TEXT_WIDTH)
    for layer in range(LAYERS):
        block = f"{see}.blocks.{layer}"
        norm(f"{block}.norm1", WIDTH)
        norm(f"{block}.norm2", WIDTH)
        linear(f"{block}.attn.qkv", WIDTH, 3 * WIDTH)
        linear(f"{block}.attn.proj", WIDTH, WIDTH)
        linear(f"{block}.mlp.fc1", WIDTH, 2 * WIDTH)
        linear(f"{block}.mlp.fc2", 2 * WIDTH, WIDTH)
        block = f"{read}.encoder.layer.{layer}"
        for attention, width in (("attention", TEXT_WIDTH), ("crossattention", WIDTH)):
            linear(f"{block}.{attention}.self.query", TEXT_WIDTH, TEXT_WIDTH)
            linear(f"{block}.{attention}.self.key", width, TEXT_WIDTH)
            linear(f"{block}.{attention}.self.value", width, TEXT_WIDTH)
            linear(f"{block}.{attention}.output.dense", TEXT_WIDTH, TEXT_WIDTH)
            norm(f"{block}.{attention}.output.LayerNorm", TEXT_WIDTH)
        linear(f"{block}.intermediate.dense", TEXT_WIDTH, 96)
        linear(f"{block}.output.dense", 96, TEXT_WIDTH)
        norm(f"{block}.output.LayerNorm", TEXT_WIDTH)
    for number, (width, following) in HEAD.items():
        linear(f"mlp.layers.{number}", width, following)
    make("blip.vision_proj.weight", 256, WIDTH)  # in the published file, and used by nothing
    weights["blip.text_encoder.embeddings.position_ids"] = torch.arange(40)[None]
    return weights


def rated(weights: Weights, pixels: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """ViT, BERT with attention to it, rating: as in the published code, in float64."""
    w = {name: each.double() if each.is_floating_point() else each for name, each in weights.items()}

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(name: str, x: torch.Tensor, eps: float) -> torch.Tensor:
        return functional.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """In heads of 64; `seen` [B, K] are the places that may be looked at."""
        q, k, v = (each.unflatten(-1, (-1, 64)).transpose(1, 2) for each in (q, k, v))
        scores = (q @ k.transpose(-1, -2) / 8).masked_fill(~seen[:, None, None, :], -torch.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)

    see, read = "blip.visual_encoder", "blip.text_encoder"
    patches = functional.conv2d(
        pixels.double(), w[f"{see}.patch_embed.proj.weight"], w[f"{see}.patch_embed.proj.bias"], PATCH
    )
    x = torch.cat([w[f"{see}.cls_token"].expand(len(pixels), -1, -1), patches.flatten(2).transpose(1, 2)], 1)
    x = x + w[f"{see}.pos_embed"]
    everywhere = torch.ones(x.shape[:2], dtype=torch.bool)
    for layer in range(LAYERS):
        block = f"{see}.blocks.{layer}"
        q, k, v = linear(f"{block}.attn.qkv", norm(f"{block}.norm1", x, 1e-6)).chunk(3, -1)
        x = x + linear(f"{block}.attn.proj", attend(q, k, v, everywhere))
        inner = functional.gelu(linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", x, 1e-6)))
        x = x + linear(f"{block}.mlp.fc2", inner)
    image = norm(f"{see}.norm", x, 1e-6)
    words = w[f"{read}.embeddings.word_embeddings.weight"][tokens]
    x = words + w[f"{read}.embeddings.position_embeddings.weight"][: tokens.shape[1]]
    x = norm(f"{read}.embeddings.LayerNorm", x, 1e-12)
    for layer in range(LAYERS):
        block = f"{read}.encoder.layer.{layer}"
        for attention, seen in (("attention", mask.bool()), ("crossattention", everywhere)):
            name, of = f"{block}.{attention}", x if attention == "attention" else image
            parts = linear(f"{name}.self.query", x), linear(f"{name}.self.key", of), linear(f"{name}.self.value", of)
            x = norm(f"{name}.output.LayerNorm", linear(f"{name}.output.dense", attend(*parts, seen)) + x, 1e-12)
        inner = functional.gelu(linear(f"{block}.intermediate.dense", x))
        x = norm(f"{block}.output.LayerNorm", linear(f"{block}.output.dense", inner) + x, 1e-12)
    rating = x[:, 0]
    for number in HEAD:
        rating = linear(f"mlp.layers.{number}", rating)
    return (rating[:, 0] - 0.16717362830052426) / 1.0333394966054072


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("imagereward")
    torch.save(random_weights(), folder / "ImageReward.pt")
    words = VOCABULARY + [f"word{number}" for number in range(WORDS - len(VOCABULARY))]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder / "tokenizer")
    return folder


def test_the_rating_is_that_of_the_published_network(folder: Path) -> None:
    arguments = {"weights": str(folder / "ImageReward.pt"), "tokenizer": str(folder / "tokenizer")}
    scores = load_reward("imagereward", arguments)(IMAGES, PROMPTS)
    tokenizer = BertTokenizer.from_pretrained(folder / "tokenizer")
    tokens = tokenizer(TEXTS, padding="max_length", max_length=35, truncation=True, return_tensors="pt")
    assert tokens["input_ids"][0, :6].tolist() == [2, 5, 6, 7, 3, 0]
    side = {"height": SIZE, "width": SIZE}
    processor = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=side)
    pixels = processor(images=pictures(IMAGES), return_tensors="pt")["pixel_values"]
    expected = rated(random_weights(), pixels, tokens["input_ids"], tokens["attention_mask"])
    torch.testing.assert_close(scores.reward.double(), expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.1  # by which a part that has no weight would show


def test_weights_that_are_not_imagerewards_are_named(folder: Path, tmp_path: Path) -> None:
    path = str(tmp_path / "other.pt")
    torch.save({"layers.0.weight": torch.ones(2, 2)}, path)
    with pytest.raises(ValueError, match=f"data.reward_args.weights is '{path}', which has no vision.embeddings.patch"):
        load_reward("imagereward", {"weights": path})
    torch.save({name: each for name, each in random_weights().items() if "crossattention" not in name}, path)
    with pytest.raises(ValueError, match="other weights than the model: 20 differ, such as text.encoder.layer.0.cross"):
        load_reward("imagereward", {"weights": path})
