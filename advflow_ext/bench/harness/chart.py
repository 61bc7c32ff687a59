"""A bench report as one page of bars that needs nothing beside itself: no script, no font, no network."""

from __future__ import annotations

from html import escape
from typing import Any

from advflow_ext.bench.harness.registry import COPY, MAX_AUTOTUNE, OURS
from advflow_ext.bench.harness.render import Result, duration, facts, seconds_of
from advflow_ext.bench.harness.report import Row, clock_of
from advflow_ext.conformance.rows import SOURCES

LABEL, BAR, LINE = 190, 420, 22  # pixels
LEGEND = {
    OURS: "advflow_ext's function, argument checks and metrics included",
    "public": "the trainer's own formula, as its code or its paper writes it",
    "compile": "torch.compile of our reference",
    MAX_AUTOTUNE: "the same, tuned",
    "eager": "our reference in plain PyTorch; of a block's op what diffusers and PEFT write",
    "library": "the fewest launches that PyTorch's own functions allow",
    "liger": "the same with Liger-Kernel's norms",
    "plain eager": "the loss in six lines, without checks",
    "plain compile": "torch.compile of those",
    COPY: "a copy of the bytes that ours must move: the roof",
}
STYLE = """
:root { color-scheme: light dark; --ours: #2f6fde; --other: #9aa3b2; --roof: #d8dce3;
  --text: #1d2430; --faint: #667085; --page: #fff }
@media (prefers-color-scheme: dark) {
  :root { --ours: #6ea0ff; --other: #6b7486; --roof: #3a4150; --text: #e6e9ef; --faint: #98a2b3; --page: #14181f }
}
body { font: 14px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page); max-width: 60rem;
  margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.4rem } h2 { font-size: 1rem; margin: 2rem 0 0 } p { margin: .2rem 0 } p, dd { color: var(--faint) }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0 1rem } dd { margin: 0 }
svg { max-width: 100%; height: auto } text { font: 13px system-ui, sans-serif; fill: var(--text) }
text.faint { fill: var(--faint) } .ours { fill: var(--ours) } .other { fill: var(--other) } .roof { fill: var(--roof) }
""".strip()


def words(row: Row, ours: float | None, clock: str) -> tuple[float | None, str]:
    """Seconds, where there are some, and what is written beside the bar."""
    if row.get("error"):
        return None, f"failed: {row['error']}"
    if not row["check"]["green"]:
        return None, "wrong result, not timed against ours"
    seconds = seconds_of(row, clock)
    if seconds is None:  # what a CUDA graph cannot hold has the time of a call alone
        clock, seconds = "times", seconds_of(row, "times")
    if seconds is None:
        return None, "not timed"
    text = duration(seconds)
    if ours is not None and row["implementation"] != OURS:
        text += f", {seconds / ours:.3g} times ours"
    return seconds, text + ("" if row[clock]["steady"] else ", unsteady")


def bars(result: Result) -> str:
    rows, clock = result["implementations"], clock_of(result["implementations"])
    ours = next((seconds_of(row, clock) for row in rows if row["implementation"] == OURS), None)
    written = [(row["implementation"], *words(row, ours, clock)) for row in rows]
    longest = max((seconds for _, seconds, _ in written if seconds is not None), default=1.0)
    lines = []
    for place, (name, seconds, text) in enumerate(written):
        y, kind = LINE * place, {OURS: "ours", COPY: "roof"}.get(name, "other")
        length = max(1.0, BAR * seconds / longest) if seconds is not None else 0.0
        lines.append(f'<text x="{LABEL - 10}" y="{y + 15}" text-anchor="end">{escape(name)}</text>')
        if length:
            box = f'x="{LABEL}" y="{y + 3}" width="{length:.1f}" height="{LINE - 6}"'
            lines.append(f'<rect class="{kind}" {box} rx="2"/>')
        lines.append(f'<text class="faint" x="{LABEL + length + 8:.1f}" y="{y + 15}">{escape(text)}</text>')
    size = f"0 0 {LABEL + BAR + 300} {LINE * len(written)}"
    return f'<svg viewBox="{size}" role="img" aria-label="{escape(result["case"]["name"])}">{"".join(lines)}</svg>'


def html(document: dict[str, Any]) -> str:
    results = document["results"]
    names = {row["implementation"] for result in results for row in result["implementations"]}
    graphs = any(clock_of(result["implementations"]) == "graph_times" for result in results)
    clocks = "in a CUDA graph, where an implementation allows one" if graphs else "called from Python"
    parts = [f"<h1>{escape('Ops of advflow_ext on this machine')}</h1>"]
    parts += [f"<p>{escape(line)}</p>" for line in (
        f"{facts(document['environment'])}.",
        f"Medians of {document['rounds']} rounds, {clocks}; forward and, where there is one, backward. Each result was "
        "checked against float64 first. Shorter is better; bars of different ops have different scales.",
        "A loss is a fraction of a percent of a training step of a large model.",
    )]  # fmt: skip
    described = (f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in LEGEND.items() if name in names)
    parts.append(f"<dl>{''.join(described)}</dl>")
    for result in results:
        parts.append(f"<h2>{escape(result['case']['name'])}</h2>")
        if result["source"] is not None:
            parts.append(f"<p>public: {escape(SOURCES[result['source']])}</p>")
        parts.append(bars(result))
    if document["left_out"]:
        parts.append(f"<p>{escape('Left out for lack of time: ' + ', '.join(document['left_out']))}.</p>")
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>advflow_ext bench</title>'
    head += f"<style>{STYLE}</style>"
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{chr(10).join(parts)}\n</body></html>\n'
