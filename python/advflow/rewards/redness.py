"""How red an image is: the easiest dense reward there is."""

from __future__ import annotations

import torch

from advflow.data.prompt import Prompt
from advflow.rewards import Scores


class Redness:
    """Mean over the image of red - (green + blue) / 2, in [-1, 1]: 0 is grey, 1 pure red."""

    def __call__(self, images: torch.Tensor, prompts: list[Prompt]) -> Scores:
        red, green, blue = images.float().mean((2, 3)).unbind(1)
        redness = red - (green + blue) / 2
        return Scores(reward=redness, score=redness)
