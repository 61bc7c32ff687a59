"""Models of the classes that rewards load, tiny and with random weights, saved as the published ones are."""

from __future__ import annotations

from pathlib import Path

import torch
from advflow.world.pretrain import build_clip_tokenizer
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    SwinConfig,
)

CLIP_SIZE = 16


def save_clip(folder: Path, width: int = 8) -> str:
    """A CLIP model whose embeddings are `width` wide, with its processor."""
    tokenizer = build_clip_tokenizer()
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = sizes | {"vocab_size": len(tokenizer), "max_position_embeddings": 12, "eos_token_id": tokenizer.eos_token_id}
    vision = sizes | {"image_size": CLIP_SIZE, "patch_size": 8}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=width))
    model.save_pretrained(folder)
    side = {"height": CLIP_SIZE, "width": CLIP_SIZE}
    images = CLIPImageProcessor(size={"shortest_edge": CLIP_SIZE}, crop_size=side)
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return str(folder)


def save_mask2former(folder: Path, classes: int = 80) -> str:
    """A Mask2Former that finds objects in noise: what it says of classes and masks is scaled up until it is sure."""
    swin = SwinConfig(
        image_size=32, patch_size=2, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=8,
        dim_feedforward=8, encoder_layers=1, decoder_layers=2, num_attention_heads=2, num_queries=12,
        num_labels=classes,
    )  # fmt: skip
    torch.manual_seed(2)
    model = Mask2FormerForUniversalSegmentation(config)
    with torch.no_grad():
        model.class_predictor.weight *= 200
        mask_embedder = model.model.transformer_module.decoder.mask_predictor.mask_embedder
        for parameter in list(mask_embedder.parameters())[-2:]:
            parameter *= 80
    model.save_pretrained(folder)
    Mask2FormerImageProcessor(size={"height": 64, "width": 64}, ignore_index=255).save_pretrained(folder)
    return str(folder)
