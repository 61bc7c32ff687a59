"""A folder of evaluated images: each as PNG, a line of scores.jsonl for each, and what was asked in summary.json."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from advflow.core.files import append_line, write_atomically
from advflow.data.prompt import Prompt
from advflow.rewards import Scores
from advflow.run.evaluate import Evaluation
from advflow.run.log import to_json

SCORES, SUMMARY, IMAGES = "scores.jsonl", "summary.json", "images"


class ScoredImages:
    """What is written as it comes, so that no more than a batch of images is held."""

    def __init__(self, folder: Path, rewards: list[str]) -> None:
        self._folder, self._rewards, self._count = folder, rewards, 0
        (folder / IMAGES).mkdir(parents=True)

    def add(self, images: torch.Tensor, prompts: list[Prompt], scores: Scores) -> None:
        """Images [B, 3, H, W] in [0, 1], and of each a reward and a score [B, R]."""
        pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        for picture, prompt, reward, score in zip(pixels, prompts, scores.reward, scores.score, strict=True):
            name = f"{IMAGES}/{self._count:06d}.png"
            Image.fromarray(picture).save(self._folder / name)
            row: dict[str, Any] = {"image": name, "prompt": prompt.text, "category": prompt.category}
            if prompt.metadata:
                row["metadata"] = dict(prompt.metadata)
            row["score"] = dict(zip(self._rewards, score.tolist(), strict=True))
            row["reward"] = dict(zip(self._rewards, reward.tolist(), strict=True))
            append_line(self._folder / SCORES, to_json(row))
            self._count += 1

    def finish(self, asked: dict[str, Any], result: Evaluation) -> None:
        found = {
            "overall": result.overall,
            "categories": result.categories,
            "rewards": {name: vars(each) for name, each in result.each.items()},
            "unscored": result.unscored,
            "images": self._count,
        }
        write_atomically(self._folder / SUMMARY, to_json(asked | found, indent=2) + "\n")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Where to write what becomes `folder` when the block has ended; nothing is left of it where that fails."""
    scratch = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        yield scratch
        os.replace(scratch, folder)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
