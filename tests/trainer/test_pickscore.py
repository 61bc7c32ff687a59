"""PickScore's loading and scoring code, on a CLIP model with random weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from advflow.rewards import Prompt
from advflow.rewards.pickscore import PickScore
from advflow.world.pretrain import build_clip_tokenizer
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("clip")
    tokenizer = build_clip_tokenizer()
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = sizes | {"vocab_size": len(tokenizer), "max_position_embeddings": 12, "eos_token_id": tokenizer.eos_token_id}
    vision = sizes | {"image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(path)
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    CLIPProcessor(images, tokenizer).save_pretrained(path)
    return str(Path(path))


def test_scores_are_scaled_cosines(folder: str) -> None:
    reward = PickScore(model=folder, processor=folder)
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    prompts = [Prompt(text) for text in ("a red circle", "two squares", "a circle above a square")]
    scores = reward(images, prompts)
    assert scores.reward.shape == (3,) and torch.equal(scores.reward, scores.score)
    bound = reward._model.logit_scale.exp().item() / 26
    assert (scores.reward.abs() <= bound).all()
    alone = torch.cat([reward(images[i : i + 1], prompts[i : i + 1]).reward for i in range(3)])
    torch.testing.assert_close(scores.reward, alone, rtol=1e-4, atol=1e-5)
