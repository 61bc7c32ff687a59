"""The page of settings: every field of `TrainConfig` with its default, what it takes and what it means."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, get_type_hints

from advflow.settings.arguments import accepted
from advflow.settings.config import TrainConfig
from docstring_parser import parse
from docstrings import inline


def sections() -> Iterator[tuple[str, type[Any]]]:
    """The dataclasses of settings by their names on the command line, the run's own first."""
    yield "", TrainConfig
    hints = get_type_hints(TrainConfig)
    for field in dataclasses.fields(TrainConfig):
        if dataclasses.is_dataclass(hints[field.name]):
            yield field.name, hints[field.name]


def settings_page() -> str:
    return "\n".join(line for name, section in sections() for line in _section(name, section))


def _section(name: str, section: type[Any]) -> Iterator[str]:
    documented = parse(section.__doc__ or "")
    meanings = {parameter.arg_name: parameter.description or "" for parameter in documented.params}
    yield f"## {name or 'The run'}"
    yield ""
    yield inline("\n\n".join(filter(None, (documented.short_description, documented.long_description))))
    yield ""
    hints = get_type_hints(section)
    for field in dataclasses.fields(section):
        if dataclasses.is_dataclass(hints[field.name]):
            continue
        key = f"{name}.{field.name}".lstrip(".")
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        yield f"### `{key}` {{ #{key} }}"
        yield ""
        kind = accepted(hints[field.name]).replace("'", '"')
        yield f"Default **`{_value(default)}`** ({kind}): {inline(meanings[field.name])}"
        yield ""


def _value(default: Any) -> str:
    if default is None:
        return "null"
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, list | tuple):
        return f"[{', '.join(map(_value, default))}]"
    return str(default) or '""'
