"""OCR: is the text that the prompt quotes in the image?"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from advflow.data.prompt import Prompt, UnknownPrompt
from advflow.rewards import Scores
from advflow.rewards.images import pictures
from advflow.rewards.loading import lacking_package, needed


class OCR:
    """1 - edit distance / length of what is wanted, in [0, 1], as in flow_grpo, DiffusionNFT and Flow-Factory.

    All that is read counts as one text, without spaces and in lower case. What is wanted stands in the prompt between
    the first two quotation marks ("), or in its metadata under "text_to_read". Here RapidOCR reads, whose models come
    with its package; there PaddleOCR, from which they are.

    Raises ValueError where it is not installed.
    """

    batch = 32

    def __init__(self) -> None:
        rapidocr = needed("rapidocr", "the reward 'ocr'", "ocr")
        needed("onnxruntime", "the reward 'ocr'", "ocr")
        self._read = rapidocr.RapidOCR(params={"Global.use_cls": False, "Global.log_level": "critical"})

    def __call__(self, images: torch.Tensor, prompts: list[Prompt]) -> Scores:
        wanted = [wanted_text(prompt) for prompt in prompts]
        score = torch.tensor(
            [legibility(self._text(picture), text) for picture, text in zip(pictures(images), wanted, strict=True)]
        )
        return Scores(reward=score, score=score)

    @staticmethod
    def lacking() -> list[ValueError]:
        return [
            *lacking_package("rapidocr", "the reward 'ocr'", "ocr"),
            *lacking_package("onnxruntime", "the reward 'ocr'", "ocr"),
        ]

    @staticmethod
    def check(prompt: Prompt) -> None:
        wanted_text(prompt)

    def _text(self, picture: Image.Image) -> str:
        blue_first = np.ascontiguousarray(np.asarray(picture)[:, :, ::-1])
        return "".join(self._read(blue_first).txts or ())


def wanted_text(prompt: Prompt) -> str:
    """The text that is to be read. Raises UnknownPrompt where there is none."""
    given = prompt.metadata.get("text_to_read")
    quoted = prompt.text.split('"')
    text = given if isinstance(given, str) else quoted[1] if len(quoted) > 1 else ""
    if not _plain(text):
        raise UnknownPrompt(f"the reward 'ocr' reads what a prompt quotes, and {prompt.text!r:.80} quotes nothing")
    return text


def legibility(read: str, wanted: str) -> float:
    read, wanted = _plain(read), _plain(wanted)
    if wanted in read:
        return 1.0
    return 1 - min(edit_distance(read, wanted), len(wanted)) / len(wanted)


def edit_distance(one: str, other: str) -> int:
    """Levenshtein's: how many characters to insert, remove or replace."""
    row = list(range(len(other) + 1))
    for count, character in enumerate(one, start=1):
        before, row[0] = row[0], count
        for place, against in enumerate(other, start=1):
            before, row[place] = row[place], min(row[place] + 1, row[place - 1] + 1, before + (character != against))
    return row[-1]


def _plain(text: str) -> str:
    return text.replace(" ", "").lower()
