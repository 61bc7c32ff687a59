"""A folder of evaluated images: each as PNG, a line of scores.jsonl for each, and what was asked in summary.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image

from advflow.core.files import write_atomically
from advflow.data.prompt import Prompt
from advflow.run.evaluate import Evaluation
from advflow.run.log import to_json

SCORES, SUMMARY, IMAGES = "scores.jsonl", "summary.json", "images"


class ScoredImages:
    """Images are written as they come, so that no more than a batch of them is held."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._count = folder, 0
        (folder / IMAGES).mkdir()

    def add(self, images: torch.Tensor) -> None:
        """Images [B, 3, H, W] in [0, 1], in the order of the prompts."""
        for picture in (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy():
            Image.fromarray(picture).save(self._folder / _name(self._count))
            self._count += 1

    def finish(self, asked: dict[str, Any], result: Evaluation, prompts: list[Prompt], rewards: list[str]) -> None:
        """Writes what they scored, and the means below what was `asked`."""
        assert result.scores is not None
        rows = []
        columns = zip(prompts, result.scores.reward.tolist(), result.scores.score.tolist(), strict=True)
        for place, (prompt, reward, score) in enumerate(columns):
            row: dict[str, Any] = {"image": _name(place), "prompt": prompt.text, "category": prompt.category}
            if prompt.metadata:
                row["metadata"] = dict(prompt.metadata)
            row["score"] = dict(zip(rewards, score, strict=True))
            row["reward"] = dict(zip(rewards, reward, strict=True))
            rows.append(to_json(row))
        write_atomically(self._folder / SCORES, "\n".join(rows) + "\n")
        found = {
            "overall": result.overall,
            "categories": result.categories,
            "rewards": {name: vars(each) for name, each in result.each.items()},
            "unscored": result.unscored,
            "distribution": result.distribution,
            "images": self._count,
        }
        write_atomically(self._folder / SUMMARY, to_json(asked | found, indent=2) + "\n")


def _name(place: int) -> str:
    return f"{IMAGES}/{place:06d}.png"
