"""The shapes rule: counts, colours, places and sizes of drawn shapes, read off the pixels by `advflow.shapes`."""

from __future__ import annotations

import torch

from advflow.data.prompt import Prompt, UnknownPrompt
from advflow.rewards import Scores
from advflow.shapes.request import Request, from_metadata
from advflow.shapes.score import score_image


class ShapesReward:
    """Reports how often a request is met in full; trains on the mean of that and of the share that is met.

    As "embedded" does, and for the same reason: the share alone is content with half a scene, full success alone is too
    rare to learn from. An image with a pixel that is not finite has no score.
    """

    def __call__(self, images: torch.Tensor, prompts: list[Prompt]) -> Scores:
        pairs = zip(images.cpu().numpy(), map(_request, prompts), strict=True)
        partial = torch.tensor([score_image(image, request).partial for image, request in pairs], dtype=torch.float32)
        strict = torch.where(partial.isnan(), partial, (partial == 1.0).float())
        return Scores(reward=(partial + strict) / 2, score=strict)

    def check(self, prompt: Prompt) -> None:
        _request(prompt)


def _request(prompt: Prompt) -> Request:
    try:
        return from_metadata(prompt.metadata)
    except ValueError as error:
        raise UnknownPrompt(f"the reward 'shapes' cannot score {prompt.text!r}: {error}") from error
