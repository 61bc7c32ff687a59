"""A prompt, from the file it stands in to the reward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

NO_CATEGORY = "all"


@dataclass(frozen=True)
class Prompt:
    """What is asked of the model.

    `category` is the group under which evaluation reports it, `metadata` what a reward may want to know beside the
    text: what is to be counted, which words are to be read.
    """

    text: str
    category: str = NO_CATEGORY
    metadata: Mapping[str, object] = field(default_factory=dict, hash=False)


class UnknownPrompt(ValueError):
    """Raised by a reward's `check` for a prompt that the reward cannot score. It ends a run before it begins."""
