"""YAML files of settings, read strictly: what a lenient reader passes over changes a run without a word."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from advflow.settings.text_files import read_text

CONFIG = "config.yaml"  # in the folder of a run, what it was started with


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """Refuses a key that is given twice, and takes 1e-3 for the number that everybody means."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str, int] = {}
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:merge" and key.value in seen:
                problem = f"{key.value} is given twice, first in line {seen[key.value]}"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            if isinstance(key, yaml.ScalarNode):
                seen[key.value] = key.start_mark.line + 1
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_yaml(path: Path, field: str) -> dict[str, Any]:
    """The mapping in a YAML file that `field` names; an empty one where the file holds nothing but comments.

    Raises ValueError naming `field`, the file and the line for what is not UTF-8, not YAML, no mapping, or given twice.
    """
    text = read_text(path, field, "a YAML file")
    try:
        content = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{field} is {str(path)!r}, which is not valid YAML: {_problem(error)}") from error
    except ValueError as error:  # a date that does not exist, for one
        raise ValueError(f"{field} is {str(path)!r}, which is not valid YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        kind = "a list" if isinstance(content, list) else f"{content!r:.60}"
        raise ValueError(f"{field} is {str(path)!r}, which holds {kind}; accepted: settings, each as `name: value`")
    return content


def _problem(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = " ".join(str(getattr(error, "problem", None) or error).split())
    if "'\\t'" in problem:
        problem = "a tab where spaces belong"
    elif tag := re.fullmatch(r"could not determine a constructor for the tag '(?P<tag>.*)'", problem):
        name = tag["tag"].replace("tag:yaml.org,2002:", "!!")
        problem = f"the tag {name}; accepted are plain values: settings make no objects and run no code"
    return problem if mark is None else f"line {mark.line + 1}: {problem}"
