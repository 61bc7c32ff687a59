"""LAION's aesthetic predictor (christophschuhmann/improved-aesthetic-predictor): how people rate a picture."""

from __future__ import annotations

import itertools

import torch
from torch import nn

from advflow.data.prompt import Prompt
from advflow.rewards import Scores
from advflow.rewards.clip import VIT_L_14, Clip
from advflow.rewards.images import eight_bit
from advflow.rewards.loading import lacking_file, lacking_model, load_into, read_weights

_WIDTHS = (768, 1024, 128, 64, 16, 1)


class Aesthetic:
    """A rating, 1 to 10, that a small network gives to CLIP's embedding of the image; the prompt plays no part.

    As in DDPO, flow_grpo and DiffusionNFT.

    Args:
        weights: file of the network, "sac+logos+ava1-l14-linearMSE" as .pth or .safetensors.
        model: folder or hub name of the CLIP model.

    Raises WrongArgument where one of them cannot be loaded.
    """

    batch = 64

    def __init__(self, weights: str, model: str = VIT_L_14) -> None:
        # From the small file on: it is seen within a second that it is the wrong one.
        self._head = rating_head(_WIDTHS)
        published = {name.removeprefix("layers."): each for name, each in read_weights("weights", weights).items()}
        load_into(self._head, published, "weights", weights)
        self._clip = Clip(model, model, ("model", "model"))
        self._head.to(self._clip.model.device)

    @staticmethod
    def lacking(weights: str, model: str = VIT_L_14) -> list[ValueError]:
        source = "sac+logos+ava1-l14-linearMSE.pth of github.com/christophschuhmann/improved-aesthetic-predictor"
        return lacking_file("weights", weights, source) + lacking_model("model", model)

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, prompts: list[Prompt]) -> Scores:
        score = self._head(self._clip.images(list(eight_bit(images)))).squeeze(1).float().cpu()
        return Scores(reward=score, score=score)


def rating_head(widths: tuple[int, ...]) -> nn.Sequential:
    """Linear layers, numbered as published: there a dropout stands behind each of the first three."""
    layers: list[nn.Module] = []
    for place, (width, following) in enumerate(itertools.pairwise(widths)):
        layers.append(nn.Linear(width, following))
        if place < 3:
            layers.append(nn.Identity())
    return nn.Sequential(*layers).eval().requires_grad_(False)
