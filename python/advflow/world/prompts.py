"""Which prompts train the policy and which are kept for evaluation."""

from __future__ import annotations

import zlib

from advflow.world.scene import CATEGORIES, Prompt, all_prompts

EVAL_PROMPTS_PER_CATEGORY = 64
_HELD_OUT_EVERY = 4


def training_prompts() -> list[Prompt]:
    """Prompts that pretraining captions and RL rollouts draw from; none of them is ever evaluated."""
    held_out = {prompt.text for prompt in _held_out_pool()}
    return [prompt for prompt in all_prompts() if prompt.text not in held_out]


def held_out_prompts(per_category: int = EVAL_PROMPTS_PER_CATEGORY) -> list[Prompt]:
    """The evaluation set: `per_category` prompts of each category, cycling through the held-out texts.

    A text that comes up more than once is evaluated from a different starting noise each time.
    """
    chosen: list[Prompt] = []
    for category in CATEGORIES:
        texts = [prompt for prompt in _held_out_pool() if prompt.category == category]
        chosen += [texts[i % len(texts)] for i in range(per_category)]
    return chosen


def _held_out_pool() -> list[Prompt]:
    """One prompt in four of every category."""
    pool: list[Prompt] = []
    for category in CATEGORIES:
        # Ordered by a checksum rather than a random generator: the split must never change with a library version.
        texts = sorted((p for p in all_prompts() if p.category == category), key=lambda p: zlib.crc32(p.text.encode()))
        pool += texts[::_HELD_OUT_EVERY]
    return pool
