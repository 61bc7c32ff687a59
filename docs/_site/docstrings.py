"""The package's docstrings as Markdown: literal blocks, tables, lists of arguments, cross references."""

from __future__ import annotations

import ast
import inspect
import re
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "advflow_ext"

_LIST = re.compile(r"(Arguments|Attributes)\b.*:$")
_ENTRY = re.compile(r"(?:^|(?<=\. ))((?:\w+, )*(?!None:)\w+): ")  # "x0, noise: ...", also after a full stop
_ROLE = re.compile(r":(?:func|class|meth):`([\w.]+)`")
_FULL_NAME = re.compile(r"(?<![`\[])`(advflow_ext\.[\w.]+)`(?![`\]])")
_CODE = re.compile(r"(``.+?``|`.+?`)")


@cache
def public_names() -> dict[str, str]:
    """Full names of what the package and its `nn` export, by the names that docstrings use."""
    found = {}
    for module, folder in (("advflow_ext", PACKAGE), ("advflow_ext.nn", PACKAGE / "nn")):
        for node in ast.parse((folder / "__init__.py").read_text()).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                for name in ast.literal_eval(node.value):
                    found[name] = found[f"{module}.{name}"] = f"{module}.{name}"
    return found


@cache
def function(name: str) -> ast.FunctionDef:
    """A public function of `ops`, read and not imported: whoever builds the site needs no torch."""
    for path in sorted((PACKAGE / "ops").glob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name == name:
                return node
    raise ValueError(f"there is no function {name} in advflow_ext/ops")


def options(name: str) -> dict[str, str]:
    """The keyword-only arguments of a function with their defaults, "" for one that has to be given."""
    arguments = function(name).args
    defaults = ["" if value is None else ast.unparse(value) for value in arguments.kw_defaults]
    return dict(zip([argument.arg for argument in arguments.kwonlyargs], defaults, strict=True))


def explained(name: str) -> dict[str, str]:
    """What a function's docstring says of its arguments, as Markdown."""
    lines = inspect.cleandoc(ast.get_docstring(function(name)) or "").split("\n")
    found: dict[str, str] = {}
    for at, line in enumerate(lines):
        if _LIST.match(line):
            for entry in _entries(lines, at + 1):
                pieces = _ENTRY.split(entry)
                for names, meaning in zip(pieces[1::2], pieces[2::2], strict=True):
                    found |= dict.fromkeys(names.split(", "), inline(meaning.strip()))
    return found


def to_markdown(docstring: str) -> str:
    lines = inspect.cleandoc(docstring).split("\n")
    out: list[str] = []
    at = 0
    while at < len(lines):
        line = lines[at]
        at += 1
        if line.startswith("===="):
            end = lines.index("", at) if "" in lines[at:] else len(lines)
            out += _table(lines[at - 1 : end])
            at = end
        elif _LIST.match(line):
            out += [f"**{line}**" if " " not in line else line, ""]
            for entry in _entries(lines, at):
                out.append("* " + inline(_ENTRY.sub(_bold_names, entry)))
            at = _end_of_indented(lines, at)
        elif line.startswith("    "):
            out.append(line)
        elif line.endswith("::"):
            out.append(inline(line[:-1]) if line != "::" else "")
        else:
            out.append(inline(line))
    return "\n".join(out)


def _bold_names(found: re.Match[str]) -> str:
    return "**" + ", ".join(f"`{name}`" for name in found[1].split(", ")) + "**: "


def _end_of_indented(lines: list[str], start: int) -> int:
    return next((at for at in range(start, len(lines)) if not lines[at].startswith("    ")), len(lines))


def _entries(lines: list[str], start: int) -> list[str]:
    """The entries of the indented list that begins at `start`, a line each."""
    entries: list[str] = []
    for line in lines[start : _end_of_indented(lines, start)]:
        if line.startswith("     "):
            entries[-1] += f" {line.strip()}"
        else:
            entries.append(line.strip())
    return entries


def _table(lines: list[str]) -> list[str]:
    """A simple table of reStructuredText, whose columns are those of its rules, as one of Markdown."""
    starts = [found.start() for found in re.finditer(r"=+", lines[0])]
    rows: list[list[str]] = []
    for line in lines:
        texts = [line[start:end].strip() for start, end in zip(starts, [*starts[1:], len(line) + 1], strict=True)]
        if line.startswith("===="):
            continue
        if texts[0]:
            rows.append(texts)
        else:  # the row before goes on
            rows[-1] = [f"{old} {more}".strip() for old, more in zip(rows[-1], texts, strict=True)]
    headless = sum(line.startswith("====") for line in lines) == 2
    if headless:
        rows.insert(0, [""] * len(starts))
    rows.insert(1, ["---"] * len(starts))
    return ["| " + " | ".join(cell(inline(text)) for text in row) + " |" for row in rows]


def inline(text: str) -> str:
    """Names of what the site explains as links, others as code; a mean <x> is no tag of HTML."""
    text = _ROLE.sub(lambda found: _link(found[1]), text)
    text = _FULL_NAME.sub(lambda found: _link(found[1]), text)
    parts = _CODE.split(text)
    return "".join(part if at % 2 else part.replace("<", "&lt;") for at, part in enumerate(parts))


def _link(name: str) -> str:
    target = public_names().get(name)
    return f"[`{name}`][{target}]" if target else f"`{name}`"


def cell(text: str) -> str:
    """`text` for a cell of a table, where a bar outside code would end it."""
    parts = _CODE.split(text)
    return "".join(part if at % 2 else part.replace("|", "\\|") for at, part in enumerate(parts))
