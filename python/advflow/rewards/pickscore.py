"""PickScore (yuvalkirstain/PickScore_v1): a CLIP model tuned on human preferences."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoProcessor, CLIPModel

from advflow.data.prompt import Prompt
from advflow.rewards import Scores

_PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
_MODEL = "yuvalkirstain/PickScore_v1"
_USUAL_MAXIMUM = 26.0  # flow_grpo and DiffusionNFT divide by it, so that rewards lie near 0.8


class PickScore:
    """logit_scale * cos(image, text) / 26, as in flow_grpo and DiffusionNFT.

    Args:
        model: folder or hub name of the CLIP model.
        processor: folder or hub name of what prepares its inputs.

    Raises ValueError where one of them cannot be loaded.
    """

    def __init__(self, model: str = _MODEL, processor: str = _PROCESSOR) -> None:
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = _load(CLIPModel, "model", model).eval().requires_grad_(False).to(self._device)
        self._processor = _load(AutoProcessor, "processor", processor)

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, prompts: list[Prompt]) -> Scores:
        inputs = self._processor(
            images=list((images * 255).round().to(torch.uint8).cpu()),
            text=[prompt.text for prompt in prompts],
            padding=True,
            truncation=True,
            return_tensors="pt",
        ).to(self._device)
        output = self._model(**inputs)
        cosine = (output.image_embeds * output.text_embeds).sum(-1)
        score = (self._model.logit_scale.exp() * cosine / _USUAL_MAXIMUM).float().cpu()
        return Scores(reward=score, score=score)


def _load(kind: Any, argument: str, name: str) -> Any:
    try:
        return kind.from_pretrained(name)
    except (OSError, ValueError) as error:  # what transformers raises for a name that it cannot reach, or make sense of
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"data.reward_args.{argument} is {name!r}, which cannot be loaded: {reason}") from error
