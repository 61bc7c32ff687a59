"""Collects training runs into one result file and one picture.

python -m bench.learning --json bench/results/learning.json --png docs/images/learning.png LABEL=RUN_FOLDER ...

Runs with the same label (other seeds) share a colour. Every picture of learning in the docs is made this way.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from bench.learning.logs import read_run
from bench.learning.pictures import draw_runs


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.learning", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="LABEL=FOLDER", help="a label and the folder of a run")
    parser.add_argument("--json", type=Path, required=True, help="where the collected numbers go")
    parser.add_argument("--png", type=Path, required=True, help="where the picture goes")
    arguments = parser.parse_args()
    runs = [read_run(*_split(word, parser)) for word in arguments.runs]
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text("[\n" + ",\n".join(map(json.dumps, runs)) + "\n]\n")  # a run a line
    arguments.png.parent.mkdir(parents=True, exist_ok=True)
    draw_runs(runs, arguments.png)
    for run in runs:
        best = max(run["held_out"])
        print(
            f"{run['label']:<28} seed {run['seed']}  {run['held_out'][0]:.3f} -> {run['held_out'][-1]:.3f} "
            f"({run['held_out'][-1] - run['held_out'][0]:+.3f}, best {best:.3f})  {run['iterations'][-1]} iterations"
        )


def _split(word: str, parser: argparse.ArgumentParser) -> tuple[str, Path]:
    label, equals, folder = word.rpartition("=")
    if not equals or not (Path(folder) / "evals.jsonl").is_file():
        parser.error(f"{word!r} is not LABEL=FOLDER with the folder of a run")
    return label, Path(folder)


if __name__ == "__main__":
    main()
