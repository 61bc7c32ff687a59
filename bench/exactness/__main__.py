"""How exact log-ratios, KL divergences and masks are, ours and the trainers': ``python -m bench.exactness``.

Writes docs/exactness.md, docs/images/exactness.png and bench/results/exactness-cpu.json; fails, and writes nothing,
where ours misses its limits.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor

import advflow_ext as af
from advflow_ext.bench.harness import report
from advflow_ext.conformance.rollout import flow_sde, log_prob, shifted_once, shifted_twice

SHAPE = (16, 64, 64)  # a 512-pixel image of Stable Diffusion 3.5
NOISE_LEVEL = 0.7
# Rounded to float32 as a scheduler holds them, so that every method has the same schedule.
SCHEDULES = {"shift 3 twice": shifted_twice(10).float(), "shift 3 once": shifted_once(10).float()}
STEPS = (0, 4, 8)
TARGETS = (1e-9, 1e-8, 1e-7, 1e-6, 1e-5)
METHODS = {
    "ours": "ours, all fp32",
    "ours_bf16_eps": "ours, eps stored in bf16",
    "log_probs": "fp32 log-probabilities subtracted",
    "bf16_means": "KL from means stored in bf16",
}
OURS = ("ours", "ours_bf16_eps")
NO_SIGN = 1e-11  # a true log-ratio below it, 1/17000 of the smallest standard deviation here, has no sign to get right
LIMITS = {"wrong_signs": 0.0, "log_ratio_error_max": 2e-10, "kl_error_max": 1e-5, "wrong_masks": 0.0}


class Answer(NamedTuple):
    log_ratio: float
    kl: float
    masked: bool


class Record(NamedTuple):
    """One method on one transition."""

    method: str
    target: float
    schedule: str
    step: int
    kl_error: float  # relative
    log_ratio_error: float
    wrong_sign: bool
    no_sign: bool
    wrong_mask: bool
    large: bool  # the true KL exceeds the threshold
    moved: float  # by what rounding eps changed the log-ratio, in its standard deviations


class Trainer:
    """A transition as yifan123/flow_grpo scores it: all sums in ``dtype``, log-probabilities subtracted."""

    def __init__(self, x: Tensor, x_next: Tensor, v_old: Tensor, sigmas: Tensor, step: int, dtype: torch.dtype) -> None:
        self.x, self.x_next = x.to(dtype), x_next.to(dtype)
        self.sigmas, self.step = sigmas.to(dtype).view(-1, 1, 1, 1), step
        self.mean_old, self.std = self.gaussian(v_old)
        self.log_prob_old = log_prob(self.x_next, (self.mean_old, self.std))

    def gaussian(self, v: Tensor) -> tuple[Tensor, Tensor]:
        s, following = self.sigmas[self.step], self.sigmas[self.step + 1]
        return flow_sde(v.to(self.x.dtype), self.x, s, following, NOISE_LEVEL, self.sigmas[1])

    def log_ratio(self, mean: Tensor) -> Tensor:
        return log_prob(self.x_next, (mean, self.std)) - self.log_prob_old

    def kl(self, mean: Tensor, stored_as: torch.dtype) -> float:
        return float(((mean.to(stored_as) - self.mean_old.to(stored_as)) ** 2 / (2 * self.std**2)).mean())


def answer(log_ratio: Tensor, kl: float, advantage: float, threshold: float) -> Answer:
    """Flow-DPPO's mask as the trainers decide it: on which side of 1 the ratio is, in the dtype of the log-ratio."""
    leaving = advantage * (float(log_ratio.exp()) - 1) > 0
    return Answer(float(log_ratio), kl, leaving and kl >= threshold)


def our_answer(arguments: tuple[Any, ...], threshold: float) -> Answer:
    metrics = af.flow_dppo_loss(*arguments, threshold=threshold).metrics.as_dict()
    return Answer(metrics["mean_log_ratio"], metrics["mean_kl_old"], metrics["masked_samples"] == 1)


def measure(samples: int) -> list[Record]:
    records: list[Record] = []
    for schedule, sigmas in SCHEDULES.items():
        table = af.StepTable(sigmas, noise_level=NOISE_LEVEL)
        for step in STEPS:
            print(f"{schedule}, step {step}", file=sys.stderr, flush=True)
            for seed in range(samples):
                records += one_transition(schedule, table, step, seed)
    return records


def one_transition(schedule: str, table: af.StepTable, step: int, seed: int) -> list[Record]:
    generator = torch.Generator().manual_seed(1000 * step + seed)
    x0, noise, direction, step_noise = torch.randn(4, 1, *SHAPE, generator=generator).unbind()
    spread, sign = torch.rand(2, generator=generator).tolist()
    sigmas = SCHEDULES[schedule]
    s = float(sigmas[step])
    x, v_old, advantage = (1 - s) * x0 + s * noise, noise - x0, 1.0 if sign < 0.5 else -1.0
    drawn = af.sde_step(v_old, x, table, step, noise=step_noise)
    rounded_eps = drawn.eps.bfloat16()
    exact, single = (Trainer(x, drawn.x_next, v_old, sigmas, step, dtype) for dtype in (torch.float64, torch.float32))
    index, A, kappa = torch.tensor([step]), torch.tensor([advantage]), float(table.kappa[step])

    records = []
    for threshold in TARGETS:
        # The KL lies between half and twice the target, which is the threshold of the mask.
        v = v_old + math.sqrt(2 * threshold * 4 ** (spread - 0.5)) / abs(kappa) * direction
        mean, mean_single = exact.gaussian(v)[0], single.gaussian(v)[0]
        truth = answer(exact.log_ratio(mean), exact.kl(mean, torch.float64), advantage, threshold)
        # What is right for a rounded eps is float64 on that eps; what the rounding changes is a number of its own.
        of_rounded_eps = (rounded_eps.double() * (mean - exact.mean_old) / exact.std).mean() - truth.kl
        of_rounded = answer(of_rounded_eps, truth.kl, advantage, threshold)
        moved = (of_rounded.log_ratio - truth.log_ratio) / math.sqrt(2 * truth.kl / x.numel())
        subtracted = single.log_ratio(mean_single)
        kl_single, kl_rounded = single.kl(mean_single, torch.float32), single.kl(mean_single, torch.bfloat16)
        answers = {
            "ours": (our_answer((v, v_old, drawn.eps, table, index, A), threshold), truth),
            "ours_bf16_eps": (our_answer((v, v_old, rounded_eps, table, index, A), threshold), of_rounded),
            "log_probs": (answer(subtracted, kl_single, advantage, threshold), truth),
            "bf16_means": (answer(subtracted, kl_rounded, advantage, threshold), truth),
        }
        for method, (given, right) in answers.items():
            no_sign = abs(right.log_ratio) <= NO_SIGN
            records.append(
                Record(
                    method,
                    threshold,
                    schedule,
                    step,
                    kl_error=abs(given.kl / right.kl - 1),
                    log_ratio_error=abs(given.log_ratio - right.log_ratio),
                    wrong_sign=not no_sign and given.log_ratio * right.log_ratio <= 0,
                    no_sign=no_sign,
                    wrong_mask=given.masked != right.masked,
                    large=right.kl >= threshold,
                    moved=abs(moved) if method == "ours_bf16_eps" else 0.0,
                )
            )
    return records


def summary(records: list[Record]) -> dict[str, float]:
    def column(name: str) -> Tensor:
        return torch.tensor([getattr(record, name) for record in records], dtype=torch.float64)

    decided = max(1.0, float((1 - column("no_sign")).sum()))
    return {
        "transitions": len(records),
        "kl_error_median": float(column("kl_error").median()),
        "kl_error_max": float(column("kl_error").max()),
        "log_ratio_error_max": float(column("log_ratio_error").max()),
        "wrong_signs": float(column("wrong_sign").sum()) / decided,
        "without_sign": int(column("no_sign").sum()),
        "wrong_masks": float(column("wrong_mask").mean()),
        "above_threshold": float(column("large").mean()),
        "moved_by_rounding_eps": float(column("moved").max()),
    }


def document(records: list[Record], samples: int) -> dict[str, Any]:
    def rows(*fields: str) -> list[dict[str, Any]]:
        groups: dict[tuple[Any, ...], list[Record]] = {}
        for record in records:
            groups.setdefault(tuple(getattr(record, field) for field in fields), []).append(record)
        return [dict(zip(fields, key, strict=True)) | summary(group) for key, group in groups.items()]

    return {
        "environment": report.environment(torch.device("cpu")),
        "elements": math.prod(SHAPE),
        "samples": samples,
        "noise_level": NOISE_LEVEL,
        "steps": list(STEPS),
        "schedules": {name: sigmas.tolist() for name, sigmas in SCHEDULES.items()},
        "limits": LIMITS,
        "results": rows("method", "target"),
        "by_step": rows("method", "target", "schedule", "step"),
    }


def missed_limits(results: list[dict[str, Any]]) -> list[str]:
    return [
        f"{row['method']} at KL {row['target']:g}: {name} is {row[name]:.3g}, allowed is {limit:.3g}"
        for row in results
        if row["method"] in OURS
        for name, limit in LIMITS.items()
        if not row[name] <= limit
    ]


# ---------------------------------------------------------------------------------------------------------------------


def markdown(result: dict[str, Any]) -> str:
    environment = result["environment"]
    lines = [
        "| KL | | relative error of the KL, median | max | wrong signs | log-ratio error, max | wrong masks |",
        "|---|---|---|---|---|---|---|",
    ]
    for target in TARGETS:
        for method, label in METHODS.items():
            row = find(result, method, target)
            of_log_ratio = [share(row["wrong_signs"]), f"{row['log_ratio_error_max']:.1e}"]
            if method == "bf16_means":
                of_log_ratio = ["as above", "as above"]
            cells = [
                number(row["kl_error_median"]), number(row["kl_error_max"]), *of_log_ratio, share(row["wrong_masks"])
            ]  # fmt: skip
            lines.append(f"| {target:.0e} | {label} | {' | '.join(cells)} |")
    moved = max(row["moved_by_rounding_eps"] for row in result["results"])
    worst_step = max(row["wrong_signs"] for row in result["by_step"] if row["method"] == "log_probs")
    without_sign = max(row["without_sign"] for row in result["results"])
    ours = [row for row in result["results"] if row["method"] in OURS]
    small, means = find(result, "log_probs", 1e-9), find(result, "bf16_means", 1e-7)
    text = TEXT.format(
        table="\n".join(lines), cpu=environment["cpu"], torch=environment["torch"], commit=environment["commit"],
        samples=result["samples"], elements=result["elements"], steps=", ".join(map(str, result["steps"])),
        transitions=ours[0]["transitions"], above=share(ours[0]["above_threshold"]), moved=share(moved),
        without_sign=f"at most {without_sign} in a row" if without_sign else "there is none",
        worst_ratio=max(row["log_ratio_error_max"] for row in ours), worst_kl=max(row["kl_error_max"] for row in ours),
        single=small["log_ratio_error_max"], std=math.sqrt(2 * 1e-9 / result["elements"]),
        single_signs=share(small["wrong_signs"]), worst_signs=share(worst_step), means=1 + means["kl_error_median"],
        means_masks=share(means["wrong_masks"]),
    )  # fmt: skip
    return text.replace("e-0", "e-")


def find(result: dict[str, Any], method: str, target: float) -> dict[str, Any]:
    return next(row for row in result["results"] if row["method"] == method and row["target"] == target)


def number(value: float) -> str:
    return f"{value:.1e}" if value < 0.1 else f"{value:.3g}"


def share(value: float) -> str:
    return "0" if value == 0 else f"{100 * value:.2g} %"


TEXT = """\
# How exact the ratios are

Written by `python -m bench.exactness`; all numbers, also by schedule and step, in
[`bench/results/exactness-cpu.json`](../bench/results/exactness-cpu.json).

Flow-GRPO, GRPO-Guard and Flow-DPPO draw their trust regions at mean-reduced KL divergences of 1e-7 to 1e-5, where
log-ratios are 1e-6 to 1e-5. Two habits lose such numbers: subtracting two float32 log-probabilities (yifan123/flow_grpo
and those that follow it), and storing the means of transitions in bfloat16 (Tencent-Hunyuan/UniRL at 1a7b501, repaired
in its pull request 444). The losses here form both quantities from v - v_old.

![error of the KL, share of wrong signs and of wrong masks, by KL](images/exactness.png)

{table}

What is compared:

* Flow-SDE with noise level 0.7, steps {steps} of ten, on the schedule of diffusers (shift 3 applied twice) and that of
  UniRL (once); {samples} random transitions each of {elements} elements, so {transitions} in every row.
* **The truth** is flow_grpo's formula in float64, on the same float32 x, x', v and v_old. Our eps is what `sde_step`
  makes of them in float32; its rounding counts as our error.
* **Wrong signs** are signs of the log-ratio that differ from the true one, zero included. A true log-ratio below 1e-11
  has no sign to get right and is left out ({without_sign}).
* **Wrong masks**: Flow-DPPO's mask against the true one, the trainers' decided by exp(log-ratio) against 1 as they do.
  The threshold is the KL of the first column. The KL of a transition lies between half of it and twice; {above} of them
  are above. A KL that is always too large gets about a quarter of the masks wrong.
* **eps in bf16**: the truth is float64 on that rounded eps, which is at most {moved} of the log-ratio's standard
  deviation away from the unrounded one.
* **Means in bf16** changes the KL alone; its log-ratio is the one of the row above, and its sigma is right.

What came out: ours has no wrong sign, no wrong mask, and errors of at most {worst_ratio:.1e} in the log-ratio and
{worst_kl:.1e} in the KL; the run fails above 2e-10 and 1e-5. Subtracted log-probabilities are off by up to
{single:.1e} at KL 1e-9, where the log-ratio's standard deviation is {std:.1e}: {single_signs} of its signs are wrong,
{worst_signs} in the worst step. Means in bf16 make a KL of 1e-7 look {means:.1f} times as large in the median and get
{means_masks} of the masks wrong.

{cpu}, torch {torch}, commit {commit}.
"""


def draw(result: dict[str, Any], path: Path) -> None:
    looks = {
        "ours": ("C0", "-o"),
        "ours_bf16_eps": ("C9", "--s"),
        "log_probs": ("C1", "-^"),
        "bf16_means": ("C3", "-D"),
    }
    figure, (error, signs, masks) = plt.subplots(1, 3, figsize=(12.5, 4.2), layout="constrained")
    for method, label in METHODS.items():
        rows = [find(result, method, target) for target in TARGETS]
        color, style = looks[method]
        size = 9 if method == "ours" else 5  # it lies below the next one
        look: dict[str, Any] = {"color": color, "markersize": size, "label": label, "alpha": 0.9}
        medians, largest = ([row[name] for row in rows] for name in ("kl_error_median", "kl_error_max"))
        error.plot(TARGETS, medians, style, **look)
        error.fill_between(TARGETS, medians, largest, color=color, alpha=0.12, linewidth=0)
        if method != "bf16_means":
            signs.plot(TARGETS, [100 * row["wrong_signs"] for row in rows], style, **look)
        masks.plot(TARGETS, [100 * row["wrong_masks"] for row in rows], style, **look)
    error.set(ylabel="relative error", yscale="log", title="KL: median, shaded up to the largest")
    signs.set(ylabel="% of transitions", title="log-ratio: sign wrong or zero")
    masks.set(ylabel="% of transitions", title="Flow-DPPO: mask wrong, threshold = KL")
    for axes in (error, signs, masks):
        axes.set(xscale="log", xlabel="KL, mean-reduced")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*error.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.exactness", description=__doc__)
    parser.add_argument("--samples", type=int, default=256, help="transitions of each schedule and step; default 256")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[2], help="default: the repository")
    options = parser.parse_args(argv)
    result = document(measure(options.samples), options.samples)
    if missed := missed_limits(result["results"]):
        print("\n".join(missed), file=sys.stderr)
        return 1
    page, picture, numbers = (
        options.out / name
        for name in ("docs/exactness.md", "docs/images/exactness.png", "bench/results/exactness-cpu.json")
    )
    for path in (page, picture, numbers):
        path.parent.mkdir(parents=True, exist_ok=True)
    numbers.write_text(json.dumps(result, indent=1) + "\n")
    page.write_text(markdown(result))
    draw(result, picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
