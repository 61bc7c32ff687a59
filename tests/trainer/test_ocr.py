"""The OCR reward: its rule, and, where RapidOCR is installed, what it reads."""

from __future__ import annotations

import socket
import sys

import numpy as np
import pytest
import torch
from advflow.rewards import Prompt, UnknownPrompt, load_reward
from advflow.rewards.ocr import edit_distance, legibility, wanted_text
from PIL import Image, ImageDraw, ImageFont

WORDS = (
    "FLOW HELLO OPEN TRAIN REWARD COFFEE BAKERY LIBRARY MUSEUM STATION MARKET GARDEN POLICY LATENT VELOCITY "
    "Matching Gradient Sampler Kernel Budget"
).split()


@pytest.mark.parametrize(
    ("read", "wanted", "expected"),
    [
        ("Hello World", "hello world", 1.0),
        ("helloworldagain", "Hello World", 1.0),  # more than is wanted around it costs nothing
        ("Hallo Welt", "hello world", 1 - 4 / 10),
        ("", "flow", 0.0),
        ("something else altogether", "flow", 0.0),  # no less than for an empty image
        ("flw", "flow", 0.75),
        ("flowwer", "flowers", 1 - 2 / 7),
    ],
)
def test_legibility_is_one_less_the_share_of_wrong_characters(read: str, wanted: str, expected: float) -> None:
    assert legibility(read, wanted) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("one", "other", "distance"),
    [("", "", 0), ("", "abc", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("abc", "abc", 0), ("ab", "ba", 2)],
)
def test_edit_distance(one: str, other: str, distance: int) -> None:
    assert edit_distance(one, other) == edit_distance(other, one) == distance


def test_what_is_wanted_is_quoted_or_in_the_metadata() -> None:
    assert wanted_text(Prompt('a sign that says "Open now" over a door')) == "Open now"
    assert wanted_text(Prompt("a sign", metadata={"text_to_read": "Open"})) == "Open"
    for text in ("a sign", 'a sign that says " "'):
        with pytest.raises(UnknownPrompt, match="the reward 'ocr' reads what a prompt quotes, and 'a sign"):
            wanted_text(Prompt(text))


def test_a_missing_package_is_a_sentence_that_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    with pytest.raises(
        ValueError, match=r"^the reward 'ocr' needs the package rapidocr, which is .*\"advflow\[ocr\]\""
    ):
        load_reward("ocr")


def _rendered(text: str, size: int = 256) -> torch.Tensor:
    """Black on white, fp32 [3, size, size]."""
    image = Image.new("RGB", (size, size), "white")
    font = ImageFont.load_default(40)
    ImageDraw.Draw(image).text((size / 2, size / 2), text, fill="black", font=font, anchor="mm")
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 255


@pytest.mark.slow
def test_rendered_words_are_read_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("rapidocr", "onnxruntime"):
        pytest.importorskip(package, reason='RapidOCR is not installed: pip install "./python[ocr]"')

    def refuse(*_: object) -> None:
        raise AssertionError("the reward asked a network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    reward = load_reward("ocr")
    prompts = [Prompt(f'a poster with the word "{word}"') for word in WORDS]
    scores = reward(torch.stack([_rendered(word) for word in WORDS]), prompts)
    assert len(WORDS) == 20 and scores.reward.mean() >= 0.95
    blank = reward(torch.ones(2, 3, 256, 256), prompts[:2])
    assert blank.reward.tolist() == [0.0, 0.0]
    wrong = reward(torch.stack([_rendered("FLOW")]), [Prompt('"LIBRARY"')])
    assert wrong.reward.item() < 0.3
