"""The embedded world's captions as features for LlamaGen's text embedding, and which of them this world has."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from advflow.autoregressive.token_model import Text
from advflow.world.captions import caption_words, held_out_captions, training_captions
from advflow.world.scene import Caption, Category, all_captions

CATEGORIES: tuple[Category, ...] = ("single_object", "colors", "two_objects")
"""What a transformer of this size learns in minutes; the first and the last leave colours open."""
PLACES = 8
"""A prefix cannot be looked up in, its queries and keys are zero: repeated it weighs more beside 64 image tokens."""
_LONGEST = max(len(caption.text.split()) for caption in all_captions())
_WORDS = {word: number for number, word in enumerate(caption_words())}
WIDTH = _LONGEST * len(_WORDS)


def training_prompts() -> list[Caption]:
    """What pretraining and rollouts draw from; none of them is ever evaluated."""
    return [caption for caption in training_captions() if caption.category in CATEGORIES]


def held_out_prompts(per_category: int) -> list[Caption]:
    """The evaluation set: `per_category` captions of each category."""
    return [caption for caption in held_out_captions(per_category) if caption.category in CATEGORIES]


def encode(texts: Sequence[str]) -> Text:
    """Which word is how many places from the end, as ones among zeros, [N, PLACES, WIDTH]: the same at all places.

    From the end "a red circle" and "a drawing of a red circle" agree.

    Raises ValueError for a word that no caption has, and for a text that is empty or too long.
    """
    features = torch.zeros(len(texts), _LONGEST, len(_WORDS))
    for row, text in enumerate(texts):
        words = text.split()
        if not 0 < len(words) <= _LONGEST or any(word not in _WORDS for word in words):
            raise ValueError(f"a prompt is {text!r}; accepted: 1 to {_LONGEST} of the words {', '.join(_WORDS)}")
        for place, word in enumerate(reversed(words)):
            features[row, place, _WORDS[word]] = 1.0
    repeated = features.flatten(1)[:, None].expand(-1, PLACES, -1)
    return Text(repeated, torch.ones(len(texts), PLACES, dtype=torch.bool))
