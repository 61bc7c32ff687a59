"""What the run is and how it went: the top of the page, and its settings and versions at the bottom."""

from __future__ import annotations

from html import escape

from advflow.report.data import Run, default_config, number
from advflow.report.panels import grouped_panels
from advflow.report.text import DASH, direction, duration_text, gain_text, plain, readable, score_text, times_text
from advflow.settings.numbers import flatten
from advflow.settings.registry import METHODS

_NOTICEABLE_DROP = 0.02  # of a score between 0 and 1


def headline(run: Run) -> str:
    base, final = run.ends()
    return f"held-out score {score_text(base)} \N{RIGHTWARDS ARROW} {score_text(final)}"


def head_section(run: Run) -> str:
    base, final = run.ends()
    if run.finished:
        state, css_class = f"Finished: {run.done:,} iterations", "finished"
    else:
        state, css_class = f"Not finished: iteration {run.done:,} of {run.iterations:,}, running or stopped", "open"
    share = 100 * min(1.0, run.done / run.iterations)
    progress = (
        f'<svg class="progress" role="img" aria-label="{share:.0f} percent done">'
        f'<rect class="track" width="100%" height="6"/><rect class="done" width="{share:.1f}%" height="6"/></svg>'
    )
    if len(run.evals) > 1:
        last = run.evals[-1]["iteration"]
        explanation = f"Held-out score before training and at iteration {last:,}, the mean over categories."
    elif run.evals:
        explanation = "Held-out score before training. There is no evaluation after it yet."
    else:
        explanation = "The run has not been evaluated yet."
    gain = ""
    if len(run.evals) > 1 and base is not None and final is not None:
        gain = f'<span class="gain {direction(base, final)}">{gain_text(base, final)}</span>'
    after = score_text(final) if len(run.evals) > 1 else DASH
    return (
        f'<header>\n<div class="top"><h1>{escape(run.name)}</h1><span class="state {css_class}">{state}</span></div>\n'
        f'<div class="headline"><p class="numbers"><span class="from">{score_text(base)}</span> '
        f'<span class="arrow">\N{RIGHTWARDS ARROW}</span> {after}</p>{gain}</div>\n'
        f'<p class="lead">{explanation}</p>\n{"" if run.finished else progress}\n'
        f"{_stats(run)}\n{_remarks(run)}</header>"
    )


def _stats(run: Run) -> str:
    config, summary = run.config, run.summary
    best = run.best
    rollout, update, both = times_text(*run.iteration_seconds) if run.iteration_seconds else (DASH, DASH, DASH)
    images = run.images
    cells = [
        ("Images drawn", DASH if images is None else f"{images:,}", _groups_text(run)),
        ("Wall time", duration_text(run.seconds), _time_text(run)),
        ("Per iteration", both, f"{rollout} rollout + {update} update" if run.iteration_seconds else ""),
        ("Best held-out", score_text(best and best[0]), f"at iteration {best[1]:,}" if best else ""),
        ("Model", plain(config.get("model.pipeline")), f"{plain(config.get('model.trainable'))} training"),
        ("Device", plain(summary.get("device", config.get("device"))), _software_text(run)),
        ("Seed", plain(config.get("seed")), ""),
        *_method_cells(run),
    ]
    rows = (
        f"<div><dt>{title}</dt><dd>{escape(value)}{f'<small>{escape(note)}</small>' if note else ''}</dd></div>"
        for title, value, note in cells
    )
    return f'<dl class="stats">{"".join(rows)}</dl>'


def _software_text(run: Run) -> str:
    """Version and threads of torch, on which the bits of a run depend; known once it has finished."""
    versions, threads = run.summary.get("versions"), number(run.summary.get("threads"))
    torch = versions.get("torch") if isinstance(versions, dict) else None
    counted = f"{threads:.0f} CPU thread{'' if threads == 1 else 's'}" if threads else ""
    return ", ".join(filter(None, [f"torch {torch}" if torch else "", counted]))


def _time_text(run: Run) -> str:
    """What the wall time was spent on; nothing where that is not known."""
    total, training = run.seconds, run.training_seconds
    if total is None or training is None or training > total:
        return ""
    return f"{duration_text(training)} iterations + {duration_text(total - training)} evaluation and the rest"


def _method_cells(run: Run) -> list[tuple[str, str, str]]:
    """What one would compare with a paper: the method's own section, and those that say what it learns from."""
    config, algorithm = run.config, plain(run.config.get("algorithm"))
    cells = [("Algorithm", algorithm, _section_text(run, METHODS.section_of(algorithm)))]
    process = METHODS[algorithm].process if algorithm in METHODS else None  # a plugin that is not here has one too
    if process == "reverse" and "sde.sampler" in config:
        kind = f"{plain(config['sde.sampler'])}, noise level {plain(config.get('sde.noise_level'))}"
        cells.append(("Sampler steps", kind, _section_text(run, "sde", but=("sampler", "noise_level"))))
    elif process == "forward" and "draws.per_image" in config:
        each = f"{plain(config['draws.per_image'])} an image"
        cells.append(("Draws of (t, noise)", each, _section_text(run, "draws", but=("per_image", "guidance"))))
    elif process == "tokens" and "tokens.epochs" in config:
        cells.append(("Tokens", f"{plain(config['tokens.epochs'])} epochs", ""))
        for section, title in (("loo_fid", "Leave-one-out FID"), ("entropy", "Entropy")):
            if config.get(f"{section}.weight"):
                weight = f"weight {plain(config[f'{section}.weight'])}"
                cells.append((title, weight, _section_text(run, section, but=("weight",))))
    if "advantage.norm" in config:
        cells.append(("Advantages", plain(config["advantage.norm"]), _section_text(run, "advantage", but=("norm",))))
    if config.get("capability.candidates") is not None:
        chosen = f"{plain(config.get('capability.select'))} of {config['capability.candidates']}"
        cells.append(("Curriculum", chosen, _section_text(run, "capability", but=("select", "candidates"))))
    scales = {section: config.get(f"{section}.guidance", 1) for section in ("rollout", "draws", "evaluation")}
    if process in ("reverse", "tokens"):
        scales["draws"] = scales["rollout"]
    if set(scales.values()) != {1}:
        drawn, learnt, evaluated = map(plain, scales.values())
        negative = config.get("rollout.negative_prompt")
        away = f"away from {plain(negative)}" if negative else ""
        cells.append(("Guidance", f"{drawn} drawn, {learnt} learnt, {evaluated} held out", away))
    return cells


def _section_text(run: Run, section: str, but: tuple[str, ...] = ()) -> str:
    """Every setting of a section that is set, those named in `but` aside."""
    start = f"{section}."
    settings = {name.removeprefix(start): value for name, value in run.config.items() if name.startswith(start)}
    shown = {name: value for name, value in settings.items() if name not in but and value is not None}
    return ", ".join(f"{name} {plain(value)}" for name, value in shown.items())


def _groups_text(run: Run) -> str:
    prompts, group = (run.config.get(f"rollout.{name}") for name in ("prompts", "images_per_prompt"))
    candidates = run.config.get("capability.candidates")
    also = f" + {candidates} of candidates" if candidates else ""
    return f"{prompts} prompts \N{MULTIPLICATION SIGN} {group}{also} a round" if prompts and group else ""


def _remarks(run: Run) -> str:
    """What someone looking after the run should know, in one sentence each."""
    remarks = []
    if run.config.get("model.random_weights"):
        remarks.append("RANDOM WEIGHTS: a trial without a model. No image, score or curve on this page means anything.")
    _, last = run.ends()
    if run.best is not None and last is not None:
        best, iteration = run.best
        if best - last >= _NOTICEABLE_DROP * max(1.0, abs(best)):
            remarks.append(
                f"The held-out score fell by {best - last:.3f} after its best, {best:.3f} at iteration {iteration:,}."
            )
    unknown = [row["iteration"] for row, score in zip(run.evals, run.scores(), strict=True) if score is None]
    if unknown:
        remarks.append(
            f"The held-out score is not a number in {len(unknown):,} of {len(run.evals):,} evaluations, "
            f"first at iteration {unknown[0]:,}."
        )
    unscored = [row["iteration"] for row in run.evals if number(row.get("unscored"))]
    if unscored:
        remarks.append(
            f"Held-out images without a finite score, left out of the means, in {len(unscored):,} of "
            f"{len(run.evals):,} evaluations, first in that of iteration {unscored[0]:,}."
        )
    gaps = {
        key: [row["iteration"] for row in run.metrics if key in row and number(row[key]) is None]
        for key in _columns(run)
    }
    if missing := {key: found for key, found in gaps.items() if found}:
        names = ", ".join(readable(key) for key in missing)
        affected = {iteration for found in missing.values() for iteration in found}
        remarks.append(
            f"Not a number in {len(affected):,} of {len(run.metrics):,} iterations, first in {min(affected):,}, "
            f"and a gap in the chart: {names}."
        )
    for panel in grouped_panels(run.metrics).get("Faults", []):
        hit = [row["iteration"] for row in run.metrics if number(row.get(panel.key))]
        if hit:
            remarks.append(
                f"{panel.title} ({panel.note}) in {len(hit):,} of {len(run.metrics):,} iterations, first in {hit[0]:,}."
            )
    if not remarks:
        return ""
    return f'<ul class="remarks">{"".join(f"<li>{escape(remark)}</li>" for remark in remarks)}</ul>'


def _columns(run: Run) -> list[str]:
    """Names of the metrics in any iteration."""
    return list(dict.fromkeys(key for row in run.metrics for key in row))


def settings_section(run: Run) -> str:
    defaults = default_config()
    rows, changed = [], 0
    for name, value in run.config.items():
        differs = name not in defaults or defaults[name] != value
        changed += differs
        default = plain(defaults[name]) if differs and name in defaults else ""
        rows.append(
            f'<tr class="{"changed" if differs else "default"}"><th scope="row" class="mono">'
            f'{escape(str(name))}</th><td class="mono">{escape(plain(value))}</td>'
            f'<td class="mono quiet">{escape(default)}</td></tr>'
        )
    return (
        "<section>\n<h2>Configuration</h2>\n"
        f'<p class="lead">{changed} of {len(rows)} settings differ from their defaults. To run it again:</p>\n'
        "<pre><code>advflow train --config config.yaml --out NEW_FOLDER</code></pre>\n"
        "<details><summary>All settings</summary>\n"
        '<div class="card scroll"><table class="settings"><thead><tr><th scope="col">setting</th>'
        '<th scope="col">value</th><th scope="col">default, where it differs</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div></details>\n</section>"
    )


def versions_section(run: Run) -> str:
    versions = run.summary.get("versions")
    known = flatten(versions) if isinstance(versions, dict) else {}
    if "commit" in run.summary:
        known["commit"] = run.summary["commit"]
    if not known:
        return '<section>\n<h2>Versions</h2>\n<p class="lead">They are recorded when the run finishes.</p>\n</section>'
    rows = "".join(
        f'<tr><th scope="row">{escape(str(name))}</th><td class="mono">{escape(plain(value))}</td></tr>'
        for name, value in known.items()
    )
    table = f'<table class="settings"><tbody>{rows}</tbody></table>'
    return f'<section>\n<h2>Versions</h2>\n<div class="card">{table}</div>\n</section>'
