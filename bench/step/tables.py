"""What bench.step has measured, as tables for a terminal and as Markdown."""

from __future__ import annotations

from advflow_ext.bench.harness.render import facts
from advflow_ext.bench.harness.report import Row
from bench.step.profile import PROFILE_SITES

PHASES = ("rollout", "training")


def warned(document: Row) -> list[str]:
    return [f"{row['variant']} warned: {text}" for row in document["results"] for text in row["warnings"]]


def tables(document: Row) -> list[list[list[str]]]:
    """Rows of cells: correctness, speed, time by site. The first row of each is its heads."""
    results = [row for row in document["results"] if row.get("profile")]
    return [_check_table(document["results"]), _speed_table(results), _site_table(results)]


def _check_table(results: list[Row]) -> list[list[str]]:
    """Distances from fp32, in brackets in units of stock's own."""
    parts = {"velocity": "velocity", "rollout_velocity": "velocity for images", "gradients": "LoRA gradients"}
    rows = [["correctness", "", *parts.values(), "gradients from stock"]]
    for result in results:
        found = result["check"]
        cells = [
            f"{found[part]['from_fp32']:.2e} ({found[part]['from_fp32'] / found[part]['stock_from_fp32']:.2f}x)"
            if part in found
            else ""
            for part in parts
        ]
        distance = f"{found['gradients']['from_stock']:.2e}" if "gradients" in found else ""
        verdict = "yes" if found["green"] else "failed: " + result["error"] if result.get("error") else "NO"
        rows.append([result["variant"], verdict, *cells, distance])
    return rows


def _speed_table(results: list[Row]) -> list[list[str]]:
    heads = ["images/s", *PHASES, "step", "of stock", "MFU", "memory GiB", "launches, rollout", "launches, training"]
    stock = next((row["images_per_second"]["step"] for row in results if row["variant"] == "stock"), None)
    rows = [heads]
    for row in results:
        rates = row["images_per_second"]
        unsteady = "" if all(times["steady"] for times in row["times"].values()) else " ?"
        rows.append(
            [
                row["variant"],
                *(f"{rates[part]:.3g}" for part in PHASES),
                f"{rates['step']:.3g}{unsteady}",
                f"{rates['step'] / stock:.2f}x" if stock and row["check"]["green"] else "-",
                f"{100 * row['mfu']['step']:.1f} %",
                f"{(row.get('held_bytes', 0) + row['peak_extra_bytes']) / 2**30:.2f}",
                *(f"{row['launches'][phase]:.0f}" for phase in PHASES),
            ]
        )
    return rows


def _site_table(results: list[Row]) -> list[list[str]]:
    """Milliseconds of a step."""
    rows = [["ms of a step", *(row["variant"] for row in results)]]
    for site in PROFILE_SITES:
        seconds = [
            sum(row["profile"][phase].get(site, {"seconds": 0})["seconds"] for phase in PHASES) for row in results
        ]
        if any(seconds):
            rows.append([site, *(f"{1e3 * each:.2f}" for each in seconds)])
    if any("host_gap_seconds" in row for row in results):
        gaps = (sum(row["host_gap_seconds"].values()) for row in results)
        rows.append(["host gaps", *(f"{1e3 * each:.2f}" for each in gaps)])
    return rows


def aligned(table: list[list[str]]) -> str:
    """For a terminal."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for cells in table:
        padded = [
            f"{cell:{width}}" if i == 0 else f"{cell:>{width}}"
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def headline(document: Row) -> str:
    work, step = document["work"], document["step"]
    return (
        f"{work['model']}, batch {work['batch']}, {work['px']} px, {work['text_tokens']} text tokens, "
        f"{step['steps']} sampler steps, {step['timesteps']} training timesteps, {step['algorithm']}; "
        f"{document['flops']['step'] / 1e12:.4g} TFLOP a step, MFU at {document['peak_tflops']:g} TFLOP/s"
    )


def markdown(document: Row) -> str:
    lines = ["# One RL step", "", f"{facts(document['environment'])}.", "", f"{headline(document)}.", ""]
    lines += [line for note in (*document["notes"], *warned(document)) for line in (note, "")]
    for table in tables(document):
        heads, *rows = (f"| {' | '.join(cells)} |" for cells in table)
        lines += [heads, "|" + "---|" * len(table[0]), *rows, ""]
    return "\n".join(lines)
