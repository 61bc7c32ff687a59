"""What the site is built with beside mkdocs: files outside docs/, generated tables, formulas as MathML."""

from __future__ import annotations

import html
import os
import re
import sys
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[2] / "python"))
from links import ROOT, links_of, target_of, with_links
from options import options_table
from settings import settings_page

_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
_OPTIONS = re.compile(r"<!-- options (\w+) -->")


def site_path(path: str) -> str:
    """Where a file of the repository is on the site: docs/ is its root, everything else keeps its place."""
    return path.removeprefix("docs/")


def repository_path(page: str) -> str:
    return f"docs/{page}" if (ROOT / "docs" / page).exists() else page


def on_files(files: Files, config: Any) -> Files:
    """Files outside docs/ that a page links to come along, pages among them with what they link to."""
    waiting = [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    waiting += ["CONTRIBUTING.md", "CHANGELOG.md", "csrc/README.md", "bench/README.md"]
    for path in waiting:
        if not path.startswith("docs/") and not files.get_file_from_path(path):
            files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
        if path.endswith(".md"):
            waiting += [link for link in linked_files(path) if link not in waiting]
    return files


def linked_files(path: str) -> list[str]:
    targets = [target_of(path, link) for link in links_of((ROOT / path).read_text())]
    return [target for target, _ in targets if (ROOT / target).is_file() and not target.startswith("docs/")]


def on_page_markdown(markdown: str, page: Page, config: Any, files: Files) -> str:
    here = page.file.src_uri

    def moved(link: str) -> str | None:
        target, anchor = target_of(repository_path(here), link)
        if (ROOT / target).is_dir():  # which a site does not have
            return None
        return os.path.relpath(site_path(target), os.path.dirname(here) or ".") + anchor

    markdown = _OPTIONS.sub(lambda found: options_table(found[1]), with_links(markdown, moved))
    return markdown.replace("<!-- settings -->", settings_page()) if here == "settings.md" else markdown


def on_page_content(html_text: str, page: Page, config: Any, files: Files) -> str:
    return _FORMULA.sub(lambda found: mathml(found[2], block=found[1] == "div"), html_text)


def mathml(latex: str, block: bool) -> str:
    formula = convert(html.unescape(latex), display="block" if block else "inline")
    return f'<div class="formula">{formula}</div>' if block else formula
