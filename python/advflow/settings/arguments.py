"""Command lines and YAML files become settings here; what is wrong with them becomes a sentence."""

from __future__ import annotations

import re
import sys
from argparse import SUPPRESS, Action
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

from jsonargparse import ArgumentParser, Namespace

from advflow.settings.suggest import did_you_mean
from advflow.settings.yaml_files import read_yaml

_WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "text", NoneType: "null"}
_FLAGS = ("resume", "dry_run", "random_weights")  # of a command, not of a run
_NOT_SETTINGS = ("help", "config", *_FLAGS, "print_config", "version", "subcommand")


class Parser(ArgumentParser):  # type: ignore[misc]
    """Takes options by their whole names alone, reads YAML strictly, and says what is wrong first and in a sentence."""

    def __init__(self, *positional: Any, **named: Any) -> None:
        self._file: str | None = None
        super().__init__(*positional, allow_abbrev=False, **named)

    def parse_path(self, path: str | Path, field: str = "--config", **how: Any) -> Namespace:
        """Parses a YAML file, which errors call by its name. `field` is what named it."""
        how.pop("_fail_no_subcommand", None)
        try:
            tree = read_yaml(Path(path), field)
        except ValueError as error:
            self.error(str(error), error)
        self._file = str(path)
        try:
            return self.parse_object(self._flat(tree), **how)
        finally:
            self._file = None

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        parser = getattr(ex, "subcommand_parser", None) or self
        sentence = parser._sentence(message)
        if parser._file is not None:
            sentence = f"{parser._file}: {sentence}"
        if not self.exit_on_error:
            raise ValueError(sentence) from ex
        program = parser.prog.replace(" [options]", "")
        sys.stderr.write(f"{program}: {sentence}\nAll options: {program} --help\n")
        raise SystemExit(2)

    def _settings(self) -> list[str]:
        """Dotted names of all settings."""
        names = [action.dest for action in self._actions if action.help != SUPPRESS]
        sections = {parent for action in self._actions for parent in _parents(action.dest)}
        return [name for name in names if name not in _NOT_SETTINGS and name not in sections]

    def _section(self, name: str) -> list[str]:
        """The settings in the section called `name`; none where there is no such section."""
        names = [action.dest for action in self._actions if action.dest.startswith(f"{name}.")]
        return [each for each in names if not each.endswith(".help")]

    def _flat(self, tree: dict[Any, Any], prefix: str = "") -> dict[str, Any]:
        """Settings by dotted name; an error for a name that there is not, or that is there twice."""
        known = self._settings()
        flat: dict[str, Any] = {}
        for key, value in tree.items():
            name = f"{prefix}{key}"
            section = self._section(name)
            if not section and name not in known:
                self.error(f"there is no setting {name}{self._hint(name)}")
            if section and not isinstance(value, dict | None):
                self.error(f"{name} is {value!r}; accepted: a mapping of {_names(section)}")
            found = {name: value} if not section else self._flat(value or {}, f"{name}.")
            if twice := flat.keys() & found.keys():
                self.error(f"{min(twice)} is given twice")
            flat |= found
        return flat

    def _hint(self, name: str) -> str:
        """What else a setting or option that does not exist may have meant."""
        dashes = "--" if name.startswith("--") else ""
        known = self._settings() + ([] if dashes else self._sections())
        if dashes:
            known += [option.removeprefix("--") for action in self._actions for option in action.option_strings]
        plain = name.removeprefix("--")
        section = plain.rpartition(".")[0]
        siblings = self._section(section) if section else []
        near = did_you_mean(dashes + plain, [dashes + each for each in siblings or dict.fromkeys(known)])
        if not near and siblings:
            return f"; {section} has {_names(siblings)}"
        return near

    def _sections(self) -> list[str]:
        return list(dict.fromkeys(name.rpartition(".")[0] for name in self._settings() if "." in name))

    def _sentence(self, message: str) -> str:
        """What jsonargparse says, in the words of this house."""
        if found := re.search(r'Parser key "(?:train\.)?(?P<key>[^"]+)":', message):
            return self._wrong_value(found["key"], message)
        if found := re.match(r"unrecognized arguments: (?P<words>.*)", message, re.DOTALL):
            return self._unknown_option(found["words"].split(" "))
        if found := re.search(r"invalid choice: '(?P<name>.*?)' \(choose from", message):
            commands = list(self._subcommands_action.choices)
            return f"there is no command {found['name']!r}{did_you_mean(found['name'], commands) or _listed(commands)}"
        if message.startswith('expected "subcommand"'):
            return f"no command is given{_listed(list(self._subcommands_action.choices))}"
        if found := re.match(r"the following arguments are required: (?P<names>.*)", message):
            names = [name.strip().rpartition(".") for name in found["names"].split(",")]  # command, dot, option
            return f"{names[0][0]} is given without {' and '.join(f'--{option}' for *_, option in names)}"
        if found := re.match(r"argument (?P<option>\S+): expected one argument", message):
            hint = _hint_of(self._action(found["option"].removeprefix("--")))
            return f"{found['option']} is given without a value{f'; accepted: {accepted(hint)}' if hint else ''}"
        if found := re.match(r"'?(?:Group '(?P<group>.*?)' does not|Option) .*?'(?P<name>[^']+)'", message.strip('"')):
            name = f"{found['group']}.{found['name']}" if found["group"] else found["name"]
            return f"there is no setting {name}{self._hint(name)}"
        return " ".join(message.split())

    def _unknown_option(self, words: list[str]) -> str:
        words = [word for word in words if word != "--"]
        options = [word.partition("=")[0] for word in words if word.startswith("-")]
        if not words:
            return "-- is no option; settings are given as --name value"
        if not options:
            return f"{words[0]!r} stands alone; settings are given as --name value"
        return f"there is no option {options[0]}{self._hint(options[0])}"

    def _wrong_value(self, key: str, message: str) -> str:
        """One sentence about a value that its setting does not take."""
        _, *values = re.split(r"(?:Got|Given) value: |Unable to load config ", message)
        given = values[-1].strip().strip("'\"") if values else "something else"
        if section := self._section(key):
            return f"{key} is {given!r}; accepted: a mapping of {_names(section)}"
        hint = _hint_of(self._action(key))
        if hint is None:
            return " ".join(message.split())
        name = key if self._section("data") and key not in _FLAGS else f"--{key}"
        near = did_you_mean(given, _choices(hint))
        return f"{name} is {given!r}{near or ';'} accepted: {accepted(hint)}"

    def _action(self, key: str) -> Action | None:
        return next((action for action in self._actions if action.dest == key), None)


def _parents(name: str) -> list[str]:
    """`a` and `a.b` of `a.b.c`."""
    return [name[: dot.start()] for dot in re.finditer(r"\.", name)]


def _hint_of(action: Action | None) -> Any:
    """The type an option was declared with."""
    return getattr(action, "_typehint", None) or getattr(action, "type", None)


def accepted(hint: Any) -> str:
    """What values a type takes, in words."""
    origin, parts = get_origin(hint), get_args(hint)
    if hint in _WORDS:
        return _WORDS[hint]
    if origin is Literal:
        return " or ".join(filter(None, [", ".join(map(repr, parts[:-1])), repr(parts[-1])]))
    if origin in (Union, UnionType):
        return " or ".join(map(accepted, parts))
    if origin is tuple and Ellipsis not in parts:
        return f"{len(parts)} values, [{', '.join(map(accepted, parts))}]"
    if origin in (list, tuple):
        return f"a list, each {accepted(parts[0])}"
    if origin is dict:
        return "a mapping"
    if is_dataclass(hint):
        return f"a mapping of {', '.join(field.name for field in fields(hint))}"
    return getattr(hint, "__name__", str(hint))


def _choices(hint: Any) -> list[str]:
    """The names among which a setting chooses."""
    if get_origin(hint) is Literal:
        return [choice for choice in get_args(hint) if isinstance(choice, str)]
    return [choice for part in get_args(hint) for choice in _choices(part)]


def _names(settings: list[str]) -> str:
    return ", ".join(name.rpartition(".")[2] for name in settings)


def _listed(names: list[str]) -> str:
    return f"; accepted: {', '.join(names)}"
