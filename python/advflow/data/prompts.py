"""The prompts of a run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from advflow.rewards import Reward, UnknownPrompt
from advflow.settings.data import EMBEDDED, DataConfig
from advflow.settings.suggest import did_you_mean
from advflow.settings.text_files import read_text
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
        texts = list(read_prompts(name, "data.prompts"))
        return PromptSource(texts, torch.ones(len(texts)))
    prompts = training_prompts()
    sizes = {category: sum(p.category == category for p in prompts) for category in {p.category for p in prompts}}
    return PromptSource([p.text for p in prompts], torch.tensor([1.0 / sizes[p.category] for p in prompts]))


def load_eval_prompts(name: str, per_category: int) -> list[str]:
    """The embedded world's held-out prompts or the lines of a file."""
    if name != EMBEDDED:
        return list(read_prompts(name, "data.eval_prompts"))
    return [prompt.text for prompt in held_out_prompts(per_category)]


def read_prompts(path: str, field: str) -> dict[str, list[int]]:
    """The different prompts of a text file in their order, each with the lines that hold it, counted from 1.

    A line ends at a newline, with or without a carriage return before it, and nowhere else: other separators of Unicode
    are text. Spaces and tabs around a prompt are dropped, and so are lines of whitespace alone. Raises ValueError
    naming `field`, the file and the line for what is not UTF-8 text, not one prompt a line, or holds no prompt.
    """
    accepted = f'"{EMBEDDED}" or a text file with one prompt a line'
    if not Path(path).exists() and (near := did_you_mean(path, [EMBEDDED])):
        raise ValueError(f"{field} is {path!r}, where there is no file{near} accepted: {accepted}")
    found: dict[str, list[int]] = {}
    for number, line in enumerate(read_text(Path(path), field, accepted).split("\n"), start=1):
        if line.strip():
            found.setdefault(line.strip(" \t"), []).append(number)
            if _is_json(line):
                raise ValueError(f"{field} is {path!r}, whose line {number} is JSON; accepted: {accepted}")
    if not found:
        raise ValueError(f"{field} is {path!r}, which holds no prompt")
    return found


def _is_json(line: str) -> bool:
    """Whether a line is a JSON object, as in the prompt files that carry metadata."""
    try:
        return line.lstrip().startswith("{") and isinstance(json.loads(line), dict)
    except json.JSONDecodeError:
        return False


def check_prompts(data: DataConfig, reward: Reward) -> list[str]:
    """Refuses prompts that the reward cannot score; returns what else should be said about the files, a sentence each.

    Raises ValueError naming the field, the file, the line and the prompt.
    """
    remarks = []
    training = {key: [0] for key in (p.text for p in training_prompts())}
    held_out = {key: [0] for key in (p.text for p in held_out_prompts())}
    if data.prompts != EMBEDDED:
        training = read_prompts(data.prompts, "data.prompts")
    if data.eval_prompts != EMBEDDED:
        held_out = read_prompts(data.eval_prompts, "data.eval_prompts")
    for field, path, prompts in (
        ("data.prompts", data.prompts, training),
        ("data.eval_prompts", data.eval_prompts, held_out),
    ):
        for text, (line, *_) in prompts.items():
            try:
                reward.category(text)
            except UnknownPrompt as error:
                where = f", line {line}" if line else ""
                raise ValueError(f"{field} is {path!r}{where}: {error}") from error
        if repeats := sum(len(lines) - 1 for lines in prompts.values()):
            lines = "1 line repeats" if repeats == 1 else f"{repeats:,} lines repeat"
            remarks.append(f"{field}: {lines} an earlier one of {path}; its {len(prompts):,} prompts count once each")
    if both := [text for text in held_out if text in training]:
        are = "prompt is" if len(both) == 1 else "prompts are"
        remarks.append(
            f"data.eval_prompts: {len(both):,} of {len(held_out):,} held-out {are} also trained on, first {both[0]!r}"
        )
    return remarks
