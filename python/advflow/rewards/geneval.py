"""GenEval (arXiv 2310.11513) as a reward: are the objects there, in their number, colours and places?"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from PIL import Image

from advflow.data.prompt import Prompt
from advflow.rewards import Scores, WrongArgument
from advflow.rewards.clip import VIT_L_14, Clip
from advflow.rewards.geneval_detector import Detector
from advflow.rewards.geneval_rules import COLORS, Found, judge, read_request
from advflow.rewards.images import eight_bit, pictures
from advflow.rewards.loading import lacking_model

_DETECTOR = "facebook/mask2former-swin-small-coco-instance"
_TEXTS = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
_BEHIND = "#999"  # of an object cut out


class GenEval:
    """Trains on flow_grpo's partial credit, or on what meets it in full; reports GenEval's own verdict.

    Args:
        detector: folder or hub name of a Mask2Former that was trained on COCO's instances.
        clip: folder or hub name of the CLIP model that tells colours apart.
        reward: "partial", the mean of marks of at most 1, or "strict", 1 where all of them are full and else 0.

    Raises WrongArgument where one of them cannot be loaded or is not accepted.
    """

    batch = 8

    def __init__(
        self, detector: str = _DETECTOR, clip: str = VIT_L_14, reward: Literal["partial", "strict"] = "partial"
    ) -> None:
        if reward not in ("partial", "strict"):
            raise WrongArgument("reward", reward, '; accepted: "partial" or "strict"')
        self._strict = reward == "strict"
        self._detect = Detector("detector", detector)
        self._color = ColorClassifier(Clip(clip, clip, ("clip", "clip")))

    def __call__(self, images: torch.Tensor, prompts: list[Prompt]) -> Scores:
        requests = [read_request(prompt) for prompt in prompts]
        found = self._detect(eight_bit(images), [request.counting for request in requests])
        verdicts = [
            judge(request, objects, partial(self._color, picture))
            for picture, request, objects in zip(pictures(images), requests, found, strict=True)
        ]
        return Scores(
            reward=torch.tensor([float(each.strict) if self._strict else each.partial for each in verdicts]),
            score=torch.tensor([float(each.correct) for each in verdicts]),
        )

    @staticmethod
    def lacking(
        detector: str = _DETECTOR, clip: str = VIT_L_14, reward: Literal["partial", "strict"] = "partial"
    ) -> list[ValueError]:
        return lacking_model("detector", detector) + lacking_model("clip", clip)

    @staticmethod
    def check(prompt: Prompt) -> None:
        read_request(prompt)


class ColorClassifier:
    """Which of ten colours an object has: that whose texts are nearest, on average, to the object cut out."""

    def __init__(self, clip: Clip) -> None:
        self._clip = clip
        self._of_class: dict[str, torch.Tensor] = {}

    def __call__(self, picture: Image.Image, name: str, objects: Sequence[Found]) -> list[str]:
        embeddings = self._clip.images([_cut_out(picture, each) for each in objects])
        return [COLORS[int(index)] for index in (embeddings @ self._colors(name).T).argmax(1)]

    def _colors(self, name: str) -> torch.Tensor:
        """Embeddings [10, D] of the colours of things of a class."""
        if name not in self._of_class:
            texts = [text.format(color=color, name=name) for color in COLORS for text in _TEXTS]
            mean = self._clip.texts(texts).view(len(COLORS), len(_TEXTS), -1).mean(1)
            self._of_class[name] = mean / torch.linalg.vector_norm(mean, dim=-1, keepdim=True)
        return self._of_class[name]


def _cut_out(picture: Image.Image, found: Found) -> torch.Tensor:
    """uint8 [3, h, w]: the object's box, grey where the object is not."""
    blank = Image.new("RGB", picture.size, color=_BEHIND)
    left, top, right, bottom = map(int, found.box)
    cut = Image.composite(picture, blank, Image.fromarray(found.mask)).crop((left, top, right, bottom))
    flat = torch.frombuffer(bytearray(cut.tobytes()), dtype=torch.uint8)
    return flat.view(cut.height, cut.width, 3).permute(2, 0, 1)
