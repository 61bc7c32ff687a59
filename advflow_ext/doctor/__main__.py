"""``advflow-doctor``, also ``python -m advflow_ext.doctor``: whether everything works here, and what to do if not."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from advflow_ext.doctor import machine
from advflow_ext.doctor.advice import Advice, advice
from advflow_ext.doctor.page import page
from advflow_ext.doctor.selftest import Trial, trials
from advflow_ext.doctor.trainers import Attempt, Trainer


def document(
    facts: dict[str, Any], trainers: Sequence[Trainer], tried: Sequence[Trial], given: Sequence[Advice]
) -> dict[str, Any]:
    """``right`` and ``ok`` are the doctor's opinion, the rest what it saw; an error that is not finite is null."""
    self_test = [asdict(trial) | {"right": trial.right} for trial in tried]
    for trial in self_test:
        trial["error"] = trial["error"] if math.isfinite(trial["error"]) else None
    return {
        "ok": not any(each.wrong for each in given),
        **facts,
        "trainers": [asdict(trainer) for trainer in trainers],
        "self_test": self_test,
        "advice": [asdict(each) for each in given],
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="advflow-doctor",
        description="Environment, build, devices, versions and trainers, every op tried against the reference, and "
        "advice. Ends with 0 where everything works, with 1 where something is wrong.",
    )
    parser.add_argument("--json", action="store_true", help="everything that was found, for machines")
    options = parser.parse_args(argv)

    attempt = Attempt()  # goes on beside the self-test
    facts = machine.facts()
    tried = list(trials(("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)))
    trainers = attempt.found()
    given = advice(facts, trainers, tried)
    if options.json:
        print(json.dumps(document(facts, trainers, tried, given), indent=1, allow_nan=False))
    else:
        coloured = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        print(page(facts, trainers, tried, given, coloured))
    return 1 if any(each.wrong for each in given) else 0


if __name__ == "__main__":
    sys.exit(main())
