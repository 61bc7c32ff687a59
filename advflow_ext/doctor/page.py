"""What was found, for people: 80 columns, coloured where a terminal shows it."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from advflow_ext.doctor.advice import Advice
from advflow_ext.doctor.selftest import Trial
from advflow_ext.doctor.trainers import STATES, Trainer

COLUMNS, MARGIN = 80, 5
MARKS = {"good": ("ok", "32"), "bad": ("!!", "31;1"), "worth": ("--", "33"), "plain": ("  ", "")}


def page(
    facts: dict[str, Any], trainers: Sequence[Trainer], tried: Sequence[Trial], given: Sequence[Advice], coloured: bool
) -> str:
    """Every section, and last what to do."""
    sections = {
        "Environment": environment(facts),
        "Build": build(facts),
        "Versions": [("plain", name, version or "not installed") for name, version in facts["versions"].items()],
        "Trainers, patched by advflow_ext.integrations": trainers_found(trainers),
        f"{'Self-test: errors of values and gradients, relative to float64':<64} fp32   bf16": self_test(tried),
    }
    lines = []
    for title, rows in sections.items():
        found = list(rows)
        width = max((len(name) + 1 for _, name, _ in found), default=0)
        lines.append(title)
        for kind, name, text in found:
            # What has no name belongs to the row above it.
            lines += row(kind, name, text, coloured, width if name else 2)
        lines.append("")
    return "\n".join([*lines, *verdict(given, coloured)])


Line = tuple[str, str, str]  # kind, name, text


def environment(facts: dict[str, Any]) -> Iterator[Line]:
    here = facts["environment"]
    yield "plain", "Python", f"{here['python']}, {here['platform']}"
    yield "plain", "CPU", f"{here['cpu']}, {here['cores']} cores, {here['threads']} threads used"
    for device in facts["devices"]:
        kind = "good" if device["served"] else "bad"
        yield kind, "GPU", f"{device['name']}, {device['memory_bytes'] / 2**30:.0f} GiB, {device['architecture']}"
    if not facts["devices"]:
        yield "plain", "GPU", "torch sees no CUDA device"
    if here["variables"]:
        yield "plain", "variables", ", ".join(f"{name}={value}" for name, value in here["variables"].items())


def build(facts: dict[str, Any]) -> Iterator[Line]:
    known = facts["build"]
    built = known["built"]
    yield "plain", "advflow_ext", f"{known['advflow_ext']}, from {known['package']}"
    if built is None:
        yield "bad", "compiled", "nothing usable: the PyTorch reference serves everything"
        return
    kernels = f"CPU and CUDA {built['nvcc']} kernels" if built["cuda"] else "CPU kernels"
    yield "good", "compiled", f"{kernels} for torch {built['torch']}, by {built['compiler']}"
    if built["architectures"]:
        yield "plain", "architectures", ", ".join(built["architectures"])
    for device, usable in known["usable"].items():
        yield "plain", device, usable


def trainers_found(trainers: Sequence[Trainer]) -> Iterator[Line]:
    kinds = {"patched": "good", "known": "good", "refused": "worth", "absent": "plain", "unknown": "worth"}
    for trainer in trainers:
        text = STATES[trainer.state]
        if trainer.state in ("absent", "unknown"):
            text += f": {trainer.sentence}"
        yield kinds[trainer.state], trainer.name, text
    if not trainers:
        yield "plain", "", "this version patches none"


def self_test(tried: Sequence[Trial]) -> Iterator[Line]:
    for (op, device), group in groupby(tried, key=lambda trial: (trial.op, trial.device)):
        trials = list(group)
        computed = "/".join(dict.fromkeys(trial.by for trial in trials if trial.by))
        errors = "  ".join(f"{trial.error:.0e}" if math.isfinite(trial.error) else "-----" for trial in trials)
        right = all(trial.right for trial in trials)
        yield "good" if right else "bad", op, f"{device:<4} {computed:<9} {errors}"
        for trial in trials:
            if trial.problem:
                yield "plain", "", f"{trial.dtype}: {trial.problem}"
            elif not trial.right:
                yield "plain", "", f"{trial.dtype}: allowed is {trial.allowed:.0e}"


def verdict(given: Sequence[Advice], coloured: bool) -> list[str]:
    wrong = sum(each.wrong for each in given)
    lines = ["Advice"] if given else []
    for each in given:
        lines += row("bad" if each.wrong else "worth", "", each.sentence, coloured)
    ends = {0: "Everything works here.", 1: "1 thing is wrong here."}
    return [*lines, *([""] if given else []), ends.get(wrong, f"{wrong} things are wrong here.")]


def row(kind: str, name: str, text: str, coloured: bool, width: int = 0) -> list[str]:
    """``width`` columns are the name's; a text that is too long goes on below its beginning."""
    mark, colour = MARKS[kind]
    shown = f"\033[{colour}m{mark}\033[0m" if coloured and colour else mark
    lines = textwrap.wrap(text, COLUMNS - MARGIN - width, break_on_hyphens=False) or [""]
    below = " " * (MARGIN + width)
    return [f"  {shown} {name:<{width}}{lines[0]}".rstrip(), *(f"{below}{line}" for line in lines[1:])]
