"""What a number in a setting may be, and the sentence that refuses another."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

_LARGEST = {float: 3.4028234e38, int: 2**63 - 1}  # what fp32 and a 64-bit integer hold


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, keys joined by dots; tuples become lists, as they do in YAML."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = in_yaml(value)
    return flat


def in_yaml(value: Any) -> Any:
    """What a setting's value is when it has been written to YAML and read again: of a tuple, a list."""
    return list(value) if isinstance(value, tuple) else value


def require_numbers(config: object, prefix: str = "") -> None:
    """Refuses a number that its field's type does not hold, in `config` and the dataclasses in it.

    That is a bool, a fraction where an integer belongs, NaN, an infinity, and what fp32 or 64 bits cannot hold. Which
    of the others are accepted is said by each class.
    """
    for name, value, types in _leaves(config, prefix):
        if isinstance(value, str) or value is None:
            continue
        kind = float if float in types else int
        fits = isinstance(value, int | kind) and not isinstance(value, bool) and abs(value) <= _LARGEST[kind]
        accepted = f"an integer of at most {2**63 - 1}" if kind is int else "a finite number of at most 3.4e38"
        require(fits, name, value, accepted)


def _leaves(config: object, prefix: str) -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    """(dotted name, value, accepted types) of every setting that may be a number."""
    hints = get_type_hints(type(config))
    for each in fields(config):  # type: ignore[arg-type]
        name, value, hint = prefix + each.name, getattr(config, each.name), hints[each.name]
        if is_dataclass(value):
            yield from _leaves(value, f"{name}.")
            continue
        types = (hint,) if isinstance(hint, type) and get_origin(hint) is None else get_args(hint)
        if bool not in types and {int, float} & set(types):
            values = value if get_origin(hint) is tuple else [value]
            yield from ((name, number, types) for number in values)


class WrongSetting(ValueError):
    """What a setting may not be, in a sentence that needs no traceback, whoever's setting it is."""


def require(condition: bool, name: str, value: object, accepted: str) -> None:
    if not condition:
        raise WrongSetting(f"{name} is {value!r}; accepted: {accepted}")
