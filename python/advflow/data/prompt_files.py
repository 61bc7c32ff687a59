"""Files of prompts: text with one a line, or JSON lines that carry a category and what a reward wants to know."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from advflow.data.prompt import NO_CATEGORY, Prompt
from advflow.settings.data import BUILT_IN_PROMPTS
from advflow.settings.suggest import did_you_mean
from advflow.settings.text_files import read_text

# As GenEval, flow_grpo and Flow-Factory spell them; the first that is there counts.
_TEXT = ("prompt", "text", "caption")
_CATEGORY = ("tag", "category")


def read_prompts(path: str, field: str) -> dict[Prompt, list[int]]:
    """The different prompts of a file in their order, each with the lines that hold it, counted from 1.

    A line ends at a newline, with or without a carriage return before it, and nowhere else: other separators of Unicode
    are text. Lines of whitespace alone are dropped. In a text file the rest of a line, without spaces and tabs around
    it, is a prompt. A file whose name ends in .jsonl, or whose first line is a JSON object, holds one object a line:
    the text under "prompt" ("text", "caption"), its category under "tag" ("category"), and all but the text reaches the
    reward as the prompt's metadata.

    Raises ValueError naming `field`, the file and the line for what is none of this.
    """
    named = ", ".join(f'"{name}"' for name in BUILT_IN_PROMPTS)
    accepted = f"{named}, a text file with one prompt a line or a .jsonl file with one object a line"
    if not Path(path).exists() and (near := did_you_mean(path, BUILT_IN_PROMPTS)):
        raise ValueError(f"{field} is {path!r}, where there is no file{near} accepted: {accepted}")
    lines = [
        (number, line)
        for number, line in enumerate(read_text(Path(path), field, accepted).split("\n"), start=1)
        if line.strip()
    ]
    if not lines:
        raise ValueError(f"{field} is {path!r}, which holds no prompt")
    is_json = path.endswith(".jsonl") or isinstance(_object_of(lines[0][1]), dict)
    found: dict[Prompt, list[int]] = {}
    for number, line in lines:
        where = f"{field} is {path!r}, whose line {number}"
        prompt = _prompt_of_json(line, where) if is_json else _prompt_of_text(line, where)
        found.setdefault(prompt, []).append(number)
    return found


def _prompt_of_text(line: str, where: str) -> Prompt:
    if isinstance(_object_of(line), dict):
        raise ValueError(f"{where} is JSON; accepted are prompts alone, or JSON in every line")
    return Prompt(line.strip(" \t"))


def _prompt_of_json(line: str, where: str) -> Prompt:
    values = _object_of(line)
    if not isinstance(values, dict):
        raise ValueError(f'{where} is {line.strip():.60}; accepted is a JSON object such as {{"prompt": "a cat"}}')
    text = _named(values, _TEXT, where)
    if text is None or not text.strip():
        names = ", ".join(map(repr, values)) or "nothing"
        raise ValueError(f'{where} has no text: it holds {names}; accepted is one under "prompt", "text" or "caption"')
    category = _named(values, _CATEGORY, where)
    metadata = {name: value for name, value in values.items() if name not in _TEXT}
    return Prompt(text.strip(), category or NO_CATEGORY, metadata)


def _named(values: dict[str, Any], names: tuple[str, ...], where: str) -> str | None:
    """The text under the first of `names` that is there."""
    name = next((name for name in names if name in values), None)
    if name is None:
        return None
    value = values[name]
    if not isinstance(value, str):
        raise ValueError(f"{where} has {json.dumps(value):.60} under {name!r}; accepted is text")
    return value


def _object_of(line: str) -> Any:
    """What a line says that may be JSON; None where it is not."""
    if not line.lstrip().startswith(("{", "[", '"')):
        return None
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None
