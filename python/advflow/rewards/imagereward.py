"""ImageReward (arXiv 2304.05977): a BLIP model that reads the prompt while it looks at the image, tuned on preferences.

Its own package needs a transformers of years ago; here its published weights run in BLIP's classes of today's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn
from transformers import BertTokenizer, BlipTextConfig, BlipVisionConfig, CLIPImageProcessor
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from advflow.data.prompt import Prompt
from advflow.rewards import Scores, WrongArgument
from advflow.rewards.aesthetic import rating_head
from advflow.rewards.images import pictures
from advflow.rewards.loading import (
    lacking_file,
    lacking_tokenizer,
    load_into,
    pretrained,
    read_weights,
    scoring_device,
)

_MEAN, _STD = 0.16717362830052426, 1.0333394966054072  # of the ratings, as published
_LONGEST = 35  # tokens
_HEAD_WIDTH = 64  # of attention, in both halves
# What the published file calls its parts, in the order in which they are renamed.
_RENAMED = (
    ("blip.visual_encoder.", "vision."),
    ("blip.text_encoder.", "text."),
    ("mlp.layers.", "head."),
    ("vision.blocks.", "vision.encoder.layers."),
    ("vision.norm.", "vision.post_layernorm."),
    ("vision.cls_token", "vision.embeddings.class_embedding"),
    ("vision.pos_embed", "vision.embeddings.position_embedding"),
    ("vision.patch_embed.proj.", "vision.embeddings.patch_embedding."),
    (".attn.proj.", ".self_attn.projection."),
    (".attn.qkv.", ".self_attn.qkv."),
    (".norm1.", ".layer_norm1."),
    (".norm2.", ".layer_norm2."),
)


class ImageReward:
    """The published model's rating, about standard normal over images of its own time, as in flow_grpo.

    Args:
        weights: its file, ImageReward.pt or the same as .safetensors.
        tokenizer: folder or hub name of BERT's tokenizer.

    Raises WrongArgument where one of them cannot be loaded.
    """

    batch = 32

    def __init__(self, weights: str, tokenizer: str = "bert-base-uncased") -> None:
        self._device = scoring_device()
        published = {_renamed(name): each for name, each in read_weights("weights", weights).items()}
        try:
            self._model = RatingModel(published)
        except KeyError as error:
            raise WrongArgument("weights", weights, f", which has no {error.args[0]} of ImageReward's") from error
        own = self._model.state_dict()  # the file also has projections that are not used
        load_into(self._model, {name: each for name, each in published.items() if name in own}, "weights", weights)
        self._model.to(self._device)
        side = {"height": self._model.size, "width": self._model.size}
        self._processor = CLIPImageProcessor(size={"shortest_edge": self._model.size}, crop_size=side)
        self._tokenizer = pretrained(BertTokenizer, "tokenizer", tokenizer)

    @staticmethod
    def lacking(weights: str, tokenizer: str = "bert-base-uncased") -> list[ValueError]:
        source = f"hf download THUDM/ImageReward ImageReward.pt --local-dir {Path(weights).parent}"
        return lacking_file("weights", weights, source) + lacking_tokenizer("tokenizer", tokenizer)

    def __call__(self, images: torch.Tensor, prompts: list[Prompt]) -> Scores:
        pixels = self._processor(images=pictures(images), return_tensors="pt")["pixel_values"]
        texts = [prompt.text for prompt in prompts]
        tokens = self._tokenizer(
            texts, padding="max_length", truncation=True, max_length=_LONGEST, return_tensors="pt"
        ).to(self._device)
        score = (self._model(pixels.to(self._device), tokens["input_ids"], tokens["attention_mask"]) - _MEAN) / _STD
        return Scores(reward=score.float().cpu(), score=score.float().cpu())


class RatingModel(nn.Module):
    """An image encoder, a text encoder that attends to it, and a rating; as large as the weights say."""

    def __init__(self, weights: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        width, _, patch, _ = weights["vision.embeddings.patch_embedding.weight"].shape
        self.size = patch * math.isqrt(weights["vision.embeddings.position_embedding"].shape[1] - 1)
        self.vision = BlipVisionModel(
            BlipVisionConfig(
                hidden_size=width,
                intermediate_size=len(weights["vision.encoder.layers.0.mlp.fc1.weight"]),
                num_hidden_layers=_layers(weights, "vision.encoder.layers."),
                num_attention_heads=width // _HEAD_WIDTH,
                image_size=self.size,
                patch_size=patch,
                layer_norm_eps=1e-6,
            )
        )
        words, text_width = weights["text.embeddings.word_embeddings.weight"].shape
        text = BlipTextConfig(
            vocab_size=words,
            hidden_size=text_width,
            encoder_hidden_size=width,
            intermediate_size=len(weights["text.encoder.layer.0.intermediate.dense.weight"]),
            num_hidden_layers=_layers(weights, "text.encoder.layer."),
            num_attention_heads=text_width // _HEAD_WIDTH,
            max_position_embeddings=len(weights["text.embeddings.position_embeddings.weight"]),
            layer_norm_eps=1e-12,
            is_decoder=True,  # for its attention to the image; it reads the text in both directions all the same
        )
        self.text = BlipTextModel(text, add_pooling_layer=False)
        self.head = rating_head((text_width, 1024, 128, 64, 16, 1))
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, pixels: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        seen = self.vision(pixel_values=pixels).last_hidden_state
        read = self.text(tokens, attention_mask=mask, encoder_hidden_states=seen, is_decoder=False).last_hidden_state
        rating: torch.Tensor = self.head(read[:, 0])
        return rating.squeeze(1)


def _renamed(name: str) -> str:
    for old, new in _RENAMED:
        name = name.replace(old, new)
    return name


def _layers(weights: Mapping[str, torch.Tensor], start: str) -> int:
    return len({name.removeprefix(start).partition(".")[0] for name in weights if name.startswith(start)})
