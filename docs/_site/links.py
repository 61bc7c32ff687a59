"""Relative links of a Markdown page, and the anchors of one."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

_LINK = re.compile(r"\[([^\]]*)\]\((?!https?://|mailto:)([^)\s]+)\)")
_BLOCK = re.compile(r"^( *)```.*?^\1```", re.MULTILINE | re.DOTALL)
_EXPLAINED = re.compile(r"^::: (\S+)(?:\n    options:\n      members: \[(.*)\])?", re.MULTILINE)
_HEADING = re.compile(r"^#+ +(.*?)(?: *\{ *#(\S+) *\})?$", re.MULTILINE)


def links_of(markdown: str) -> list[str]:
    return list(dict.fromkeys(link for _, link in _LINK.findall(_BLOCK.sub("", markdown))))


def with_links(markdown: str, change: Callable[[str], str | None]) -> str:
    """The page with each relative link changed, or its text alone for None; what stands in blocks of code is none."""

    def changed(found: re.Match[str]) -> str:
        link = change(found[2])
        return found[1] if link is None else f"[{found[1]}]({link})"

    at, out = 0, ""
    for block in [*_BLOCK.finditer(markdown), None]:
        out += _LINK.sub(changed, markdown[at : block.start()] if block else markdown[at:])
        if block:
            out, at = out + block[0], block.end()
    return out


def target_of(page: str, link: str) -> tuple[str, str]:
    """The path in the repository that `link` on `page` leads to, and its anchor, "" or with its #."""
    path, hash_, anchor = link.partition("#")
    target = os.path.normpath(os.path.join(os.path.dirname(page), path)) if path else page
    return target, hash_ + anchor


def anchors_of(markdown: str) -> set[str]:
    """Those of headings, alike on GitHub and the site while they are plain words, and of public names."""
    text = _BLOCK.sub("", markdown)
    anchors = {given or _slug(heading) for heading, given in _HEADING.findall(text)}
    for name, members in _EXPLAINED.findall(text):
        anchors |= {name, *(f"{name}.{member}" for member in members.split(", ") if member)}
    return anchors


def _slug(heading: str) -> str:
    heading = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    return re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-")
