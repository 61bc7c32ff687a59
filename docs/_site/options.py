"""The table of a function's options: the defaults of its signature, the words of its docstring."""

from __future__ import annotations

from docstrings import cell, explained, function, options


def options_table(name: str) -> str:
    rows = ["| option | default | |", "|---|---|---|"]
    for option, default in options(name).items():
        shown = f"`{default}`" if default else "required"
        rows.append(f"| `{option}` | {shown} | {cell(_meaning(name, option))} |")
    return "\n".join(rows)


def _meaning(name: str, option: str) -> str:
    """Docstrings say "as in" instead of saying it twice; those of the reverse process do so of whole lists."""
    own = explained(name).get(option)
    if own and not own.startswith("as in "):
        return own
    reverse = "table" in [argument.arg for argument in function(name).args.args]
    if not own and not reverse:
        raise ValueError(f"the docstring of {name} does not explain {option}")
    return explained("flow_grpo_loss" if reverse else "advantage_flow_loss")[option]
