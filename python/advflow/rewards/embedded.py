"""The embedded world's reward: the rule-based check of `advflow.world.reward`."""

from __future__ import annotations

import torch

from advflow.data.prompt import Prompt, UnknownPrompt
from advflow.rewards import Scores
from advflow.world.reward import score_batch
from advflow.world.scene import Caption, all_captions


class EmbeddedReward:
    """Reports how often a request is met in full; trains on the mean of that and of the share that is met.

    The share alone would be dense but content with half a scene; full success alone is too rare to learn from.
    """

    def __init__(self) -> None:
        self._captions = {caption.text: caption for caption in all_captions()}

    def __call__(self, images: torch.Tensor, prompts: list[Prompt]) -> Scores:
        scores = score_batch(images.cpu().numpy(), [self._caption(prompt) for prompt in prompts])
        return Scores(
            reward=torch.tensor([(s.partial + s.correct) / 2 for s in scores], dtype=torch.float32),
            score=torch.tensor([float(s.correct) for s in scores]),
        )

    def check(self, prompt: Prompt) -> None:
        self._caption(prompt)

    def _caption(self, prompt: Prompt) -> Caption:
        if prompt.text not in self._captions:
            known = "the prompts of the embedded world alone, such as 'a red circle'"
            raise UnknownPrompt(f"the reward 'embedded' scores {known}, not {prompt.text!r}")
        return self._captions[prompt.text]
