"""Objects found by Mask2Former, as mmdet's inference on which GenEval was published finds them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch.nn import functional
from transformers import AutoImageProcessor, Mask2FormerForUniversalSegmentation

from advflow.rewards import WrongArgument
from advflow.rewards.geneval_rules import CLASSES, Found
from advflow.rewards.loading import frozen, pretrained

Sizes: TypeAlias = tuple[Sequence[int], tuple[int, int], Sequence[int]]
"""(height, width) of what the model was given, of the image in it, and of the image itself."""

_MOST_FOUND = 100  # in an image
_MOST_OF_A_CLASS = 16
_SURE = {False: 0.3, True: 0.9}  # by whether the prompt is about a number of objects


class Detector:
    """Raises WrongArgument, naming `argument`, where the model cannot be loaded or does not know COCO's classes."""

    def __init__(self, argument: str, name: str) -> None:
        self._model = frozen(Mask2FormerForUniversalSegmentation, argument, name)
        self._processor = pretrained(AutoImageProcessor, argument, name)
        if self._model.config.num_labels != len(CLASSES):
            known = self._model.config.num_labels
            raise WrongArgument(argument, name, f", which knows {known} classes; accepted are COCO's {len(CLASSES)}")

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, counting: list[bool]) -> list[dict[str, list[Found]]]:
        """What is in each of uint8 images [B, 3, H, W], by class, the surest first."""
        inputs = self._processor(images=list(images), return_tensors="pt").to(self._model.device)
        output = self._model(**inputs)
        # Where the image lies in what the model was given, the rest of which is padding.
        height, width = (int(inputs["pixel_mask"][0].amax(side).sum()) for side in (1, 0))
        size = inputs["pixel_values"].shape[-2:], (height, width), images.shape[-2:]
        return [
            _found(classes, masks, size, _SURE[counted])
            for classes, masks, counted in zip(
                output.class_queries_logits, output.masks_queries_logits, counting, strict=True
            )
        ]


def _found(
    class_logits: torch.Tensor,
    mask_logits: torch.Tensor,
    size: Sizes,
    sure: float,
) -> dict[str, list[Found]]:
    """Objects surer than `sure` of one image, of class logits [Q, 81] and mask logits [Q, h, w]."""
    scores, places = class_logits.float().softmax(-1)[:, :-1].flatten().topk(min(_MOST_FOUND, class_logits.shape[0]))
    # A mask only ever lowers the score: what is unsure already needs none.
    scores, places = scores[scores > sure], places[scores > sure]
    logits = _at_size(mask_logits[places // len(CLASSES)].float(), size)
    masks = logits > 0
    inside = (logits.sigmoid() * masks).sum((1, 2)) / (masks.sum((1, 2)) + 1e-6)
    found: dict[str, list[Found]] = {}
    for score, order in zip(*(scores * inside).sort(descending=True), strict=True):
        objects = found.setdefault(CLASSES[int(places[order]) % len(CLASSES)], [])
        if score > sure and len(objects) < _MOST_OF_A_CLASS:
            objects.append(Found(_box(masks[order]), masks[order].cpu().numpy(), score.item()))
    return {name: objects for name, objects in found.items() if objects}


def _at_size(logits: torch.Tensor, size: Sizes) -> torch.Tensor:
    """Mask logits [N, h, w] at the image's own size [N, H, W]: enlarged, rid of the padding, resized back."""
    if not len(logits):
        return logits.new_zeros(0, *size[2])
    padded, (height, width), own = size
    enlarged = functional.interpolate(logits[:, None], padded, mode="bilinear", align_corners=False)
    image = enlarged[:, :, :height, :width]
    return functional.interpolate(image, own, mode="bilinear", align_corners=False)[:, 0]


def _box(mask: torch.Tensor) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of a mask that is not empty; right and bottom lie behind its last pixel."""
    (rows,), (columns,) = mask.any(1).nonzero(as_tuple=True), mask.any(0).nonzero(as_tuple=True)
    return float(columns[0]), float(rows[0]), float(columns[-1]) + 1, float(rows[-1]) + 1
