"""A table and plots of a bench report: ``python -m advflow_ext.bench.harness.render RESULT.json --out FOLDER``.

Writes FOLDER/table.md, and where matplotlib is installed FOLDER/OP.png: time, and achieved bandwidth as a share of the
copy measured beside it, over the bytes our algorithm must move; one line for each implementation, one row for each
dtype. Rows that failed their correctness check are in neither.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from advflow_ext.bench.harness.registry import COPY, OURS
from advflow_ext.bench.harness.report import Row, clock_of, speedup

Result = dict[str, Any]


class Point(NamedTuple):
    bytes_moved: int
    seconds: float
    share_of_copy: float  # of the bandwidth of a copy of the same bytes


def group_of(result: Result) -> tuple[str, bool | None]:
    return result["case"]["op"], result["case"]["with_ref"]


def groups(document: dict[str, Any]) -> dict[str, list[Result]]:
    """The cases of one op, with v_ref or without, by a title."""
    ordered = sorted(document["results"], key=lambda result: (group_of(result)[0], str(group_of(result)[1])))
    words = {None: "", True: ", with v_ref", False: ", no v_ref"}
    return {op + words[ref]: list(found) for (op, ref), found in groupby(ordered, key=group_of)}


def seconds_of(row: Row, clock: str) -> float | None:
    """Median seconds by that clock, or None where the row has no time or a wrong result."""
    if not row["check"]["green"] or row.get(clock) is None:
        return None
    return float(row[clock]["median"])


def copy_seconds(document: dict[str, Any], result: Result, clock: str) -> float:
    """Of the copy in the same case, or in a report without one by the bandwidth of the large copy."""
    beside = [seconds_of(row, clock) for row in result["implementations"] if row["implementation"] == COPY]
    if beside and beside[0] is not None:
        return beside[0]
    return float(result["bytes_moved"] / document["copy_bytes_per_second"])


def series(document: dict[str, Any], results: list[Result], dtype: str) -> dict[str, list[Point]]:
    """Points by implementation, by rising bytes; of the device alone where it was timed alone."""
    lines: dict[str, list[Point]] = {}
    for result in sorted(results, key=lambda result: result["bytes_moved"]):
        if result["case"]["dtype"] != dtype:
            continue
        clock = clock_of(result["implementations"])
        copied = copy_seconds(document, result, clock)
        for row in result["implementations"]:
            seconds = seconds_of(row, clock)
            if seconds is None:  # not capturable: what it takes when called
                seconds = seconds_of(row, "times")
            if seconds is not None:
                point = Point(result["bytes_moved"], seconds, copied / seconds)
                lines.setdefault(row["implementation"], []).append(point)
    return lines


def duration(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.3g} us"


def cell(result: Result, name: str) -> str:
    rows = result["implementations"]
    row = next((row for row in rows if row["implementation"] == name), None)
    if row is None:
        return ""
    if row.get("error"):
        return "failed"
    if not row["check"]["green"]:
        return "wrong"
    words = []
    for clock in ("graph_times", "times"):
        seconds = seconds_of(row, clock)
        if seconds is None:
            continue
        ratio = None if name == OURS else speedup(rows, name, clock)
        words.append(duration(seconds) + (f" ({ratio:.2f}x)" if ratio is not None else ""))
    return " / ".join(words) + ("" if row["times"]["steady"] else " ?")


def table(document: dict[str, Any], results: list[Result]) -> list[str]:
    names: list[str] = []
    for result in results:
        names += [row["implementation"] for row in result["implementations"] if row["implementation"] not in names]
    heads = ["latents", "bytes", *names, "of copy", "memory"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for result in results:
        case = result["case"]
        line = [f"{'x'.join(map(str, case['shape']))} {case['dtype']}", f"{result['bytes_moved'] / 1e6:.3g} MB"]
        line += [cell(result, name) for name in names]
        ours = series(document, [result], case["dtype"]).get(OURS)
        line.append(f"{100 * ours[0].share_of_copy:.0f} %" if ours else "")
        peak = next(
            (row.get("peak_extra_bytes") for row in result["implementations"] if row["implementation"] == OURS), None
        )
        line.append("" if peak is None else f"{peak / result['gradient_bytes']:.2f}")
        lines.append(f"| {' | '.join(line)} |")
    return lines


def facts(environment: dict[str, Any]) -> str:
    gpu = environment["gpu"]
    words = [f"{gpu['name']}, {gpu['driver']}" if gpu else f"{environment['cpu']}, {environment['threads']} threads"]
    words += [f"{name} {environment[name]}" for name in ("torch", "cuda", "triton", "python") if environment.get(name)]
    return "; ".join([*words, f"commit {environment['commit']}", environment["date"]])


def markdown(document: dict[str, Any]) -> str:
    graphs = any(clock_of(result["implementations"]) == "graph_times" for result in document["results"])
    clocks = "in a CUDA graph / called from Python" if graphs else "called from Python"
    lines = [
        "# Bench", "", f"{facts(document['environment'])}.", "",
        f"A large copy reaches {document['copy_bytes_per_second'] / 1e9:.0f} GB/s. Medians of {document['rounds']} "
        f"rounds, {clocks}; in brackets how many times as long as ours; \"?\": the machine was unsteady; \"of copy\": "
        "ours, as a share of the bandwidth of the copy beside it; memory in tensors of the latents' size.", "",
    ]  # fmt: skip
    for title, results in groups(document).items():
        lines += [f"## {title}", "", *table(document, results), ""]
    if document.get("left_out"):
        lines += [f"Left out for lack of time: {', '.join(document['left_out'])}.", ""]
    return "\n".join(lines)


def draw(document: dict[str, Any], title: str, results: list[Result], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    dtypes = sorted({result["case"]["dtype"] for result in results})
    lines = {dtype: series(document, results, dtype) for dtype in dtypes}
    names = list(dict.fromkeys(name for each in lines.values() for name in each))
    colors = {name: f"C{i}" for i, name in enumerate(name for name in names if name != COPY)} | {COPY: "0.55"}
    size = (11, 0.9 + 3.3 * len(dtypes))
    figure, axes = plt.subplots(len(dtypes), 2, figsize=size, squeeze=False, sharex=True, layout="constrained")
    for (time, share), dtype in zip(axes, dtypes, strict=True):
        for name, points in lines[dtype].items():
            x, seconds, shares = zip(*points, strict=True)
            look = {
                "color": colors[name],
                "marker": "o",
                "markersize": 4,
                "linewidth": 2.2 if name == OURS else 1.2,
                "linestyle": "--" if name == COPY else "-",
                "zorder": 3 if name == OURS else 2,
            }
            time.plot(x, [1e6 * each for each in seconds], label=name, **look)
            share.plot(x, [100 * each for each in shares], **look)
        time.set(xscale="log", yscale="log", ylabel=f"{dtype}: microseconds")
        share.set(xscale="log", ylabel="% of the copy's bandwidth", ylim=(0, None))
        for each in (time, share):
            each.grid(alpha=0.3)
            each.spines[["top", "right"]].set_visible(False)
    for each in axes[-1]:
        each.set_xlabel("bytes that must be moved")
    figure.suptitle(title)
    handles, labels = [], []
    for handle, label in (pair for row in axes for pair in zip(*row[0].get_legend_handles_labels(), strict=True)):
        if label not in labels:
            handles.append(handle)
            labels.append(label)
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 7), frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m advflow_ext.bench.harness.render", description=__doc__)
    parser.add_argument("result", type=Path, metavar="RESULT.json")
    parser.add_argument("--out", type=Path, metavar="FOLDER", required=True)
    options = parser.parse_args(argv)
    document = json.loads(options.result.read_text())
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "table.md").write_text(markdown(document))
    print(options.out / "table.md")
    try:
        for title, results in groups(document).items():
            path = options.out / f"{title.replace(', ', '-').replace(' ', '-')}.png"
            draw(document, title, results, path)
            print(path)
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        print(
            "matplotlib is not installed here, so there are no plots; where it is, they come from "
            f"'python -m advflow_ext.bench.harness.render {options.result} --out {options.out}'."
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
