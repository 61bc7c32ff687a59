"""Diffs for trainers whose loss stands inline in their ``main``, where nothing can be replaced by name.

``python -m advflow_ext.integrations.patches apply diffusion_nft PATH`` applies one to a checkout; with ``--check`` it
only says whether it could. A diff is made for the files of one commit and applies to no others.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

_CHANGED = re.compile(r"^diff --git a/(\S+) b/\S+\nindex (\w{40})\.\.(\w{40})", re.MULTILINE)


@dataclass(frozen=True)
class TrainerPatch:
    """A diff of ours and the version of the trainer that it is for."""

    name: str
    diff: Path

    @cached_property
    def text(self) -> str:
        return self.diff.read_text(encoding="utf-8")

    @property
    def repository(self) -> str:
        """On GitHub, as owner/name."""
        return self._header("Repository")

    @property
    def commit(self) -> str:
        return self._header("Commit")

    @property
    def files(self) -> dict[str, tuple[str, str]]:
        """Each changed file, and git's name for its content before and after."""
        return {path: (before, after) for path, before, after in _CHANGED.findall(self.text)}

    def _header(self, field: str) -> str:
        _, _, rest = self.text.partition(f"\n{field}: ")
        return rest.partition("\n")[0]


PATCHES = {diff.name.rpartition("-")[0]: diff for diff in sorted(Path(__file__).parent.glob("*.patch"))}


def trainer_patch(name: str) -> TrainerPatch:
    """The patch called ``name``. Raises ValueError for a name that is none."""
    if name not in PATCHES:
        raise ValueError(f"name is {name!r}; accepted are {', '.join(PATCHES)}.")
    return TrainerPatch(name, PATCHES[name])


def apply(name: str, checkout: Path, *, check: bool = False) -> TrainerPatch:
    """Applies the patch called ``name`` to a checkout, wherever its HEAD is; with ``check`` nothing is written.

    Raises ValueError where a file is not that of the patch's commit, or was changed since; then nothing is written.
    """
    patch = trainer_patch(name)
    for path, (before, after) in patch.files.items():
        if not (checkout / path).is_file():
            raise ValueError(f"{checkout} has no {path}; accepted is a checkout of {patch.repository}.")
        content = _content_name((checkout / path).read_bytes())
        if content == after:
            raise ValueError(f"{checkout / path} has this patch already; `git apply -R {patch.diff}` takes it back.")
        if content != before:
            raise ValueError(
                f"{checkout / path} is not that of {patch.repository} at {patch.commit[:7]}; accepted is that version "
                f"without changes, `git checkout {patch.commit[:7]} -- {path}`."
            )
    command = ["git", "apply", *(["--check"] if check else []), str(patch.diff)]
    # A checkout may lie in a repository of the user's, where git would take its paths for those of that one.
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(checkout.resolve().parent)}
    subprocess.run(command, cwd=checkout, env=environment, check=True)
    return patch


def _content_name(content: bytes) -> str:
    """As git names it, which a file without its repository has as well."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
