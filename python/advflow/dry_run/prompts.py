"""Prompts of a run that has not started: how many, of what kinds, which of them no reward could score."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

from advflow.data.prompt import Prompt
from advflow.data.prompts import (
    held_out_lines,
    load_eval_prompts,
    said_of_files,
    training_lines,
    unknown_prompts,
)
from advflow.dry_run.findings import Findings
from advflow.rewards.examined import Examined
from advflow.settings.data import DataConfig

_CATEGORIES_SHOWN = 12
_ALL = 10**9
_OF_RECIPES = ("prompts/geneval/", "prompts/pickscore/", "prompts/ocr/")
_PUBLISHED = "https://github.com/yifan123/flow_grpo"


def look_at_prompts(
    data: DataConfig, per_category: int, rewards: Mapping[bool, list[Examined]], found: Findings
) -> tuple[int, int]:
    """Says what the files hold; returns how many prompts are trained on, and how many evaluated.

    `rewards` by whether they are learnt from: the others see held-out prompts alone.
    """
    training: dict[Prompt, list[int]] = {}
    held_out: dict[Prompt, list[int]] = {}
    evaluated: list[Prompt] = []
    with found.noting():
        training = training_lines(data)
        found.say("training prompts", _counts(data.prompts, training))
    with found.noting():
        held_out = held_out_lines(data)
        evaluated = load_eval_prompts(data.eval_prompts, per_category)
        found.say("held-out prompts", f"{_counts(data.eval_prompts, evaluated)} an evaluation")
    for field, path, prompts, asked in (
        ("data.prompts", data.prompts, training, rewards[True]),
        ("data.eval_prompts", data.eval_prompts, held_out, rewards[True] + rewards[False]),
    ):
        unknown = []
        with found.noting():
            for each in asked:
                each.expect(list(prompts))
            unknown = unknown_prompts(field, path, prompts, partial(_ask_all, asked), _ALL)
        if unknown:
            more = f"; and {len(unknown) - 1:,} more" if len(unknown) > 1 else ""
            found.fault(unknown[0] + more)
    for remark in (*_sources(data), *said_of_files(data, training, held_out)):
        found.say("note", remark)
    return len(training), len(evaluated)


def _sources(data: DataConfig) -> Iterator[str]:
    """Where the files of the built-in recipes come from, of those that are not there."""
    for path in (data.prompts, data.eval_prompts):
        if path.startswith(_OF_RECIPES) and not Path(path).is_file():
            yield f"{path} is {path.replace('prompts', 'dataset', 1)} of {_PUBLISHED}"


def _ask_all(rewards: Iterable[Examined], prompt: Prompt) -> None:
    for each in rewards:
        if each.check is not None:
            each.check(prompt)


def _counts(name: str, prompts: Iterable[Prompt]) -> str:
    sizes = Counter(prompt.category for prompt in prompts)
    kinds = [f"{category} {count:,}" for category, count in sizes.most_common(_CATEGORIES_SHOWN)]
    left = len(sizes) - len(kinds)
    of = f" ({', '.join(kinds)}{f' and {left} more categories' if left else ''})" if len(sizes) > 1 else ""
    return f"{sum(sizes.values()):,} of {name}{of}"
