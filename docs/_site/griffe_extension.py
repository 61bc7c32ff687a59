"""Hands mkdocstrings each docstring as Markdown."""

from __future__ import annotations

from typing import Any

import griffe
from docstrings import to_markdown


class MarkdownDocstrings(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **named: Any) -> None:
        if obj.docstring:
            obj.docstring.value = to_markdown(obj.docstring.value)
