"""``python -m advflow_ext.conformance``: the table of all rows."""

from __future__ import annotations

import argparse
import json
import sys
from itertools import groupby
from pathlib import Path

import torch

import advflow_ext as af
from advflow_ext import conformance
from advflow_ext.conformance.rows import AGREEING_DIGITS, SOURCES, Row


def table(compared: list[Row]) -> str:
    lines = []
    for trainer, its_rows in groupby(compared, key=lambda row: row.trainer):
        lines.append(f"{trainer:<52} {'ours':>14} {'theirs':>14} {'digits':>6}  agrees")
        lines.append(f"  {SOURCES.get(trainer, '')}")
        for row in its_rows:
            verdict = "yes" if row.agrees else f"no: {row.departs}" if row.departs else "NO"
            ours, theirs = (float(values[0].flatten()[0]) for values in (row.ours, row.theirs))
            lines.append(f"  {row.quantity:<50} {ours:>14.8g} {theirs:>14.8g} {row.digits:>6.1f}  {verdict}")
            lines.append(f"      {row.call}")
        lines.append("")
    return "\n".join(lines)


LEGEND = """\
'...' stands for v, x0, noise, t, A or v, v_old, eps, table, index, A, and for rewards, group_size. Shown is the first
value of a row; the digits are those of its worst element. A loss row also compares the gradient with respect to v."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m advflow_ext.conformance", description=conformance.__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table there too")
    options = parser.parse_args(argv)
    compared = conformance.rows()
    wrong = [row for row in compared if not row.agrees and not row.departs]
    print(table(compared))
    print(LEGEND)
    print(
        f"{sum(row.agrees for row in compared)} of {len(compared)} rows agree to {AGREEING_DIGITS:g} digits or more, "
        f"{sum(bool(row.departs) for row in compared)} show where a trainer departs, {len(wrong)} are wrong."
    )
    if options.json is not None:
        versions = {"advflow_ext": af.__version__, "torch": torch.__version__}
        document = {"versions": versions, "rows": [row.to_json() for row in compared]}
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
