"""PickScore (yuvalkirstain/PickScore_v1): a CLIP model tuned on human preferences."""

from __future__ import annotations

import torch

from advflow.data.prompt import Prompt
from advflow.rewards import Scores
from advflow.rewards.clip import Clip
from advflow.rewards.loading import lacking_model, lacking_processor

_PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
_MODEL = "yuvalkirstain/PickScore_v1"
_USUAL_MAXIMUM = 26.0  # flow_grpo and DiffusionNFT divide by it, so that rewards lie near 0.8


class PickScore:
    """logit_scale * cos(image, text) / 26, as in flow_grpo and DiffusionNFT.

    Args:
        model: folder or hub name of the CLIP model.
        processor: folder or hub name of what prepares its inputs.

    Raises WrongArgument where one of them cannot be loaded.
    """

    batch = 32

    def __init__(self, model: str = _MODEL, processor: str = _PROCESSOR) -> None:
        self._clip = Clip(model, processor)
        self._scale = self._clip.model.logit_scale.exp().item() / _USUAL_MAXIMUM

    @staticmethod
    def lacking(model: str = _MODEL, processor: str = _PROCESSOR) -> list[ValueError]:
        return lacking_model("model", model) + lacking_processor("processor", processor)

    def __call__(self, images: torch.Tensor, prompts: list[Prompt]) -> Scores:
        score = self._scale * self._clip.cosines(images, [prompt.text for prompt in prompts])
        return Scores(reward=score, score=score)
