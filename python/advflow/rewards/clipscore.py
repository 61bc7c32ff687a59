"""CLIPScore: how alike image and prompt are to CLIP."""

from __future__ import annotations

import torch

from advflow.data.prompt import Prompt
from advflow.rewards import Scores
from advflow.rewards.clip import VIT_L_14, Clip
from advflow.rewards.loading import lacking_model


class CLIPScore:
    """cos(image, text), as in Flow-Factory, and in DiffusionNFT, whose logit / 100 it is. flow_grpo: logit / 30.

    Args:
        model: folder or hub name of the CLIP model and of what prepares its inputs.

    Raises WrongArgument where it cannot be loaded.
    """

    batch = 64

    def __init__(self, model: str = VIT_L_14) -> None:
        self._clip = Clip(model, model, ("model", "model"))

    @staticmethod
    def lacking(model: str = VIT_L_14) -> list[ValueError]:
        return lacking_model("model", model)

    def __call__(self, images: torch.Tensor, prompts: list[Prompt]) -> Scores:
        score = self._clip.cosines(images, [prompt.text for prompt in prompts])
        return Scores(reward=score, score=score)
