"""Which captions train the policy and which are kept for evaluation."""

from __future__ import annotations

import zlib

from advflow.world.scene import CATEGORIES, Caption, all_captions

EVAL_CAPTIONS_PER_CATEGORY = 64
_HELD_OUT_EVERY = 4


def training_captions() -> list[Caption]:
    """What pretraining and rollouts draw from; none of them is ever evaluated."""
    held_out = {prompt.text for prompt in _held_out_pool()}
    return [prompt for prompt in all_captions() if prompt.text not in held_out]


def held_out_captions(per_category: int = EVAL_CAPTIONS_PER_CATEGORY) -> list[Caption]:
    """The evaluation set: `per_category` captions of each category, cycling through the held-out texts.

    A text that comes up more than once is evaluated from a different starting noise each time.
    """
    chosen: list[Caption] = []
    for category in CATEGORIES:
        texts = [prompt for prompt in _held_out_pool() if prompt.category == category]
        chosen += [texts[i % len(texts)] for i in range(per_category)]
    return chosen


def caption_words() -> list[str]:
    """Every word of the world, in a fixed order."""
    return sorted({word for prompt in all_captions() for word in prompt.text.split()})


def _held_out_pool() -> list[Caption]:
    """One caption in four of every category."""
    pool: list[Caption] = []
    for category in CATEGORIES:
        # Ordered by a checksum rather than a random generator: the split must never change with a library version.
        texts = sorted((p for p in all_captions() if p.category == category), key=lambda p: zlib.crc32(p.text.encode()))
        pool += texts[::_HELD_OUT_EVERY]
    return pool
