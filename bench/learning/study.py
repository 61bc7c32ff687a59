"""The comparisons of docs/learning.md: runs them, collects their logs, and writes the tables and pictures.

python -m bench.learning.study run [STUDY ...] --at-once 2       # trains what is missing; goes on where it was killed
python -m bench.learning.study collect [STUDY ...]               # logs of finished runs -> bench/results/learning/
python -m bench.learning.study write                             # those -> tables of docs/learning.md, docs/images/

Without a name every study of bench/learning/studies.py is meant. A run that several studies share is trained once. On a
GPU, `--device cuda --at-once 30`: runs are small, so that many of them share it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from advflow.dry_run.dry_run import dry_run
from advflow.settings.sources import resolve_configs, to_config, train_parser
from tqdm import tqdm

from advflow_ext.bench.harness import report
from bench.learning.document import write_document
from bench.learning.logs import read_run
from bench.learning.studies import SEEDS, STUDIES, Study

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results" / "learning"


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    chosen = {name: STUDIES[name] for name in arguments.studies or STUDIES} if arguments.command != "write" else STUDIES
    if arguments.command == "run":
        return train(list(runs_of(chosen.values())), arguments.folder, arguments.at_once, arguments.device)
    if arguments.command == "collect":
        for name, study in chosen.items():
            collect(name, study, arguments.folder)
        return 0
    found = {name: json.loads(path.read_text()) for name in STUDIES if (path := RESULTS / f"{name}.json").is_file()}
    write_document(found, ROOT / "docs")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.learning.study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run, collected, _ = (commands.add_parser(name) for name in ("run", "collect", "write"))
    for command in (run, collected):
        command.add_argument("studies", nargs="*", choices=[[], *STUDIES], metavar="STUDY", help=", ".join(STUDIES))
        command.add_argument("--folder", type=Path, default=Path("runs/learning"), help="where the runs are")
    run.add_argument("--at-once", type=_positive, default=2, help="runs at a time, of one CPU thread each; default 2")
    run.add_argument("--device", default="cpu", help="of advflow train; default cpu")
    return parser


def _positive(word: str) -> int:
    if not word.isdecimal() or int(word) == 0:
        raise argparse.ArgumentTypeError(f"is {word}; accepted: 1 or more")
    return int(word)


def runs_of(studies: Iterable[Study]) -> Iterator[tuple[str, int]]:
    """Each run once, all of one seed before the next: what is cut off has compared everything a little."""
    settings = dict.fromkeys(itertools.chain.from_iterable(study.rows.values() for study in studies))
    return ((each, seed) for seed in SEEDS for each in settings)


def folder_of(settings: str, seed: int) -> str:
    words = re.sub(r"--(\w+\.)?|[{}]", "", settings)
    return re.sub(r"[^\w.:,-]+", "_", words) + f"-seed{seed}"


def train(runs: list[tuple[str, int]], folder: Path, at_once: int, device: str) -> int:
    """Trains those of the `runs` that are not finished, none where one cannot be begun; returns how many failed."""
    missing = [run for run in runs if not (folder / folder_of(*run) / "summary.json").is_file()]
    print(f"{len(runs)} runs, {len(runs) - len(missing)} of them finished before", flush=True)
    if wrong := faults(words_of(*run, folder, device) for run in missing):
        print(*wrong, sep="\n", file=sys.stderr)
        return len(wrong)
    failed = 0
    with ThreadPoolExecutor(at_once) as pool:
        futures = {pool.submit(_train, *run, folder, device): run for run in missing}
        for future in tqdm(as_completed(futures), total=len(futures), desc="runs", unit="run"):
            if status := future.result():
                failed += 1
                print(f"{folder_of(*futures[future])} ended with {status}; see its .log", file=sys.stderr, flush=True)
    return failed


def words_of(settings: str, seed: int, folder: Path, device: str) -> list[str]:
    """A run's words behind `advflow`."""
    out = str(folder / folder_of(settings, seed))
    return ["train", *shlex.split(settings), "--seed", str(seed), "--device", device, "--out", out, "--resume"]


def faults(runs: Iterable[list[str]]) -> list[str]:
    """A sentence for all that would end one of the runs before its first iteration."""
    found = []
    for words in tqdm(list(runs), desc="settings", unit="run", leave=False):
        parser, resolved = train_parser(), resolve_configs(words)[1:]
        given = parser.parse_args(resolved)
        given.pop("resume")
        looked_at = dry_run(to_config(parser, given), resume=True, size=1)
        found += [f"{shlex.join(words)}: {fault}" for fault in looked_at.faults]
    return found


def _train(settings: str, seed: int, folder: Path, device: str) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    words = words_of(settings, seed, folder, device)
    with (folder / f"{folder_of(settings, seed)}.log").open("a") as log:
        # One thread: results depend on how many there are.
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [sys.executable, "-m", "advflow", *words], stdout=log, stderr=log, env=environment
        ).returncode


def collect(name: str, study: Study, folder: Path) -> None:
    found: list[dict[str, Any]] = []
    for (label, settings), seed in itertools.product(study.rows.items(), SEEDS):
        out = folder / folder_of(settings, seed)
        if (out / "summary.json").is_file():
            found.append({"arguments": settings} | read_run(label, out))
    expected = len(study.rows) * len(SEEDS)
    print(f"{name}: {len(found)} of {expected} runs")
    if not found:
        return
    devices = {run["summary"]["device"] for run in found}
    if len(devices) > 1:
        raise SystemExit(f"{name}: runs in {folder} are of {' and '.join(sorted(devices))}; accepted is one device")
    commits = {run["summary"]["commit"] or "unknown" for run in found}  # what ran, which is not what collects
    environment = report.environment(torch.device(found[0]["summary"]["device"])) | {
        "commit": ", ".join(sorted(commits))
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(_rounded(run)) for run in found)  # a run a line
    text = f'{{"environment": {json.dumps(environment)},\n"runs": [\n{lines}\n]}}\n'
    (RESULTS / f"{name}.json").write_text(text)


def _rounded(value: Any) -> Any:
    """Five digits: what is below is noise, and twice the bytes."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list) else value


if __name__ == "__main__":
    sys.exit(min(main(), 1))
