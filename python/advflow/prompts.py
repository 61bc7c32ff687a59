"""The prompts of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from advflow.model import EMBEDDED
from advflow.world.prompts import held_out_prompts, training_prompts


@dataclass(frozen=True)
class PromptSource:
    """Training prompts; each iteration draws some without repetition, with probability proportional to `weights`."""

    texts: list[str]
    weights: torch.Tensor

    def require(self, count: int) -> None:
        """Refuses to draw more prompts in an iteration than there are."""
        if count > len(self.texts):
            raise ValueError(f"rollout.prompts is {count}; data.prompts has only {len(self.texts)} different prompts")

    def draw(self, count: int, rng: torch.Generator) -> list[int]:
        return torch.multinomial(self.weights, count, generator=rng).tolist()


def load_training_prompts(name: str) -> PromptSource:
    """The embedded world's training prompts, every category as likely as the others, or the lines of a file."""
    if name != EMBEDDED:
        texts = _read_lines(name, "data.prompts")
        return PromptSource(texts, torch.ones(len(texts)))
    prompts = training_prompts()
    sizes = {category: sum(p.category == category for p in prompts) for category in {p.category for p in prompts}}
    return PromptSource([p.text for p in prompts], torch.tensor([1.0 / sizes[p.category] for p in prompts]))


def load_eval_prompts(name: str, per_category: int) -> list[str]:
    """The embedded world's held-out prompts or the lines of a file."""
    if name != EMBEDDED:
        return _read_lines(name, "data.eval_prompts")
    return [prompt.text for prompt in held_out_prompts(per_category)]


def _read_lines(path: str, field: str) -> list[str]:
    if not Path(path).is_file():
        raise ValueError(f'{field} is {path!r}; accepted: "embedded" or a text file with one prompt a line')
    lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    texts = list(dict.fromkeys(line for line in lines if line))
    if not texts:
        raise ValueError(f"{field} is {path!r}, which holds no prompt")
    return texts
