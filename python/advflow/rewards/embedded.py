"""The embedded world's reward: the rule-based check of `advflow.world.reward`."""

from __future__ import annotations

import torch

from advflow.rewards import Scores, UnknownPrompt
from advflow.world.reward import score_batch
from advflow.world.scene import Prompt, all_prompts


class EmbeddedReward:
    """Reports how often a request is met in full; trains on the mean of that and of the share that is met.

    The share alone would be dense but content with half a scene; full success alone is too rare to learn from.
    """

    def __init__(self) -> None:
        self._prompts = {prompt.text: prompt for prompt in all_prompts()}

    def __call__(self, images: torch.Tensor, prompts: list[str]) -> Scores:
        scores = score_batch(images.cpu().numpy(), [self._known(text) for text in prompts])
        return Scores(
            reward=torch.tensor([(s.partial + s.correct) / 2 for s in scores], dtype=torch.float32),
            score=torch.tensor([float(s.correct) for s in scores]),
        )

    def category(self, prompt: str) -> str:
        return self._known(prompt).category

    def _known(self, text: str) -> Prompt:
        if text not in self._prompts:
            known = "the prompts of the embedded world alone, such as 'a red circle'"
            raise UnknownPrompt(f"the reward 'embedded' scores {known}, not {text!r}")
        return self._prompts[text]
