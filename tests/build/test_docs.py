"""The pages lead somewhere, leave nothing public out and say what result files say; `make docs` builds the site."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
import yaml

import advflow_ext as af
from advflow_ext.losses import LOSSES

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "docs/_site"))
from docstrings import options, to_markdown
from links import anchors_of, links_of, target_of, with_links
from options import options_table

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [
    str(page.relative_to(ROOT))
    for page in (*ROOT.glob("*.md"), ROOT / "bench/README.md", ROOT / "csrc/README.md", *sorted(DOCS.rglob("*.md")))
]
CODE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
RESULTS = ROOT / "bench/results"


def faults(page: str, markdown: str) -> list[str]:
    """Links of a page that lead nowhere."""
    found = []
    for link in links_of(markdown):
        target, anchor = target_of(page, link)
        if not (ROOT / target).exists():
            found.append(f"{link}: there is no {target}")
        elif anchor and anchor[1:] not in anchors_of((ROOT / target).read_text()):
            found.append(f"{link}: {target} has no such heading")
    return found


@pytest.mark.parametrize("page", PAGES)
def test_links_and_anchors_exist(page: str) -> None:
    assert faults(page, (ROOT / page).read_text()) == []


def test_a_link_to_nowhere_is_noticed() -> None:
    page = "[a](../README.md#train) [b](no.md) [c](runs.md#no-such) [d](https://x.org)\n```\n[e](no.py)\n```\n"
    assert faults("docs/runs.md", page) == [
        "no.md: there is no docs/no.md",
        "runs.md#no-such: docs/runs.md has no such heading",
    ]


def test_links_are_changed_outside_of_code_alone() -> None:
    page = "[a](x.md)\n```\n[b](x.md)\n```\n[c](https://x.md) ![d](y.md#z) [`e`](folder)"
    changed = "[a](to/x.md)\n```\n[b](x.md)\n```\n[c](https://x.md) ![d](to/y.md#z) `e`"
    assert with_links(page, lambda link: None if link == "folder" else f"to/{link}") == changed


def test_anchors_are_those_of_the_site() -> None:
    page = (
        "# The GPU: 2026-11-26, an H200\n\n### `x.y` { #x.y }\n\n::: a.B\n    options:\n      members: [c, d]\n::: e\n"
    )
    assert anchors_of(page) == {"the-gpu-2026-11-26-an-h200", "x.y", "a.B", "a.B.c", "a.B.d", "e"}


def test_every_page_is_in_the_navigation() -> None:
    sections = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    pages = {
        path for section in sections for entries in section.values() for entry in entries for path in entry.values()
    }
    assert {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")} <= pages
    assert [page for page in pages if not (DOCS / page).exists() and not (ROOT / page).exists()] == []


def test_the_api_reference_has_every_public_name() -> None:
    explained = re.findall(r"^::: (\S+)$", "\n".join(page.read_text() for page in DOCS.glob("api/*.md")), re.MULTILINE)
    public = {f"advflow_ext.{name}" for name in af.__all__} | {f"advflow_ext.nn.{name}" for name in af.nn.__all__}
    assert sorted(explained) == sorted(public)
    listed = (DOCS / "api/reference.md").read_text()
    assert [name for name in af.reference.__all__ if f"`{name}`" not in listed] == []


def test_every_loss_has_its_formula_and_its_options() -> None:
    pages = {
        "forward": (DOCS / "algorithms/forward.md").read_text(),
        "reverse": (DOCS / "algorithms/reverse.md").read_text(),
    }
    for name, loss in LOSSES.items():
        section = pages[loss.family].partition(f"<!-- options {name} -->")[0].rpartition("\n## ")[2]
        assert "$$" in section and f"[`{name}`](../api/losses.md#advflow_ext.{name})" in section, name
        assert [line.split(" | ")[0] for line in options_table(name).split("\n")[2:]] == [
            f"| `{option}`" for option in options(name)
        ]


def test_a_table_of_options_has_defaults_and_words() -> None:
    table = options_table("flow_dppo_loss").split("\n")
    assert table[2].startswith("| `threshold` | `1e-06` | at least 0, in mean-reduced KL. The paper uses 1e-7")
    assert "| `kl_weight` | `0.0` | weight of the reference term, at least 0; above 0 it needs v_ref. |" in table
    assert "| `v_old` | required | velocity of the rollout policy, shaped like v. |" in options_table("flow_awr_loss")


@pytest.mark.parametrize("name", ["group_advantages", "softmax_advantages", "cross_level_advantages"])
def test_the_options_of_advantages_are_theirs(name: str) -> None:
    section = (DOCS / "algorithms/advantages.md").read_text().partition(f"[`{name}`]")[2].partition("\n## ")[0]
    told = dict(re.findall(r"^\| `(\w+)` \| (?:required|`(.+?)`) \|", section, re.MULTILINE))
    assert told == options(name)


def test_docstrings_become_markdown() -> None:
    docstring = """Mean <x> of :func:`sde_step`, by :meth:`forget`::

        a <b>

    ====  =====
    name  value
    ====  =====
    "a"   |x|
          and y
    ====  =====

    Arguments:
        v, w: one
            and two. t: three. None: four.

    End.
    """
    assert to_markdown(docstring).split("\n") == [
        "Mean &lt;x> of [`sde_step`][advflow_ext.sde_step], by `forget`:",
        "",
        "    a <b>",
        "",
        "| name | value |",
        "| --- | --- |",
        '| "a" | \\|x\\| and y |',
        "",
        "**Arguments:**",
        "",
        "* **`v`, `w`**: one and two. **`t`**: three. None: four.",
        "",
        "End.",
    ]


def test_the_page_of_settings_explains_each() -> None:
    pytest.importorskip("diffusers")
    from advflow.settings.sources import train_parser
    from settings import settings_page

    page = settings_page()
    explained = re.findall(r"^### `(\S+)` \{ #\1 \}\n\nDefault \*\*`.+?`\*\* \(.+?\): \S", page, re.MULTILINE)
    assert explained == train_parser()._settings()
    assert (
        "### `flow_grpo.clip` { #flow_grpo.clip }\n\n"
        "Default **`0.0001`** (a number): the mean-reduced ratio is clipped to 1 +- this.\n" in page
    )
    assert "[`advflow_ext.flow_grpo_loss`][advflow_ext.flow_grpo_loss]" in page


def blocks(page: str) -> list[str]:
    return CODE.findall((ROOT / page).read_text())


@pytest.mark.parametrize(
    ("page", "first", "last"), [("docs/index.md", -1.99, -0.2), ("docs/algorithms/reverse.md", -1.8, -0.5)]
)
def test_the_loops_of_the_pages_learn(page: str, first: float, last: float) -> None:
    names: dict[str, Any] = {}
    exec(blocks(page)[0], names)
    assert names["rewards"][0] == pytest.approx(first, abs=0.2) and names["rewards"][-1] > last


def test_the_readme_calls_what_there_is() -> None:
    v, x0, noise, v_old, v_ref = torch.randn(5, 16, 4, 8, 8)
    names = {"x0": x0, "noise": noise, "v_old": v_old, "v_ref": v_ref, "v": v.requires_grad_()}
    exec(blocks("README.md")[0], names | {"t": torch.rand(16).clamp(0.1), "rewards": torch.randn(16)})
    assert v.grad is not None and v.grad.abs().min() > 0


@pytest.mark.parametrize("page", ["docs/index.md", "docs/transformer.md"])
def test_a_transformer_is_patched_as_the_pages_do(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    diffusers = pytest.importorskip("diffusers")
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=32,
        pos_embed_max_size=8, dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    exec(blocks(page)[-1], {"af": af, "transformer": transformer})
    assert capsys.readouterr().out


def test_the_reward_of_the_pages_is_one() -> None:
    pytest.importorskip("diffusers")
    from advflow.rewards import CheckedReward, Prompt

    names: dict[str, Any] = {}
    exec(blocks("docs/runs.md")[0], names)
    prompts = [Prompt("a"), Prompt("b")]
    reward = CheckedReward(names["Brightness"](target=0.75))
    assert reward(torch.full((2, 3, 4, 4), 0.5), prompts).reward.tolist() == [0.75, 0.75]


def test_the_table_of_rewards_is_that_of_the_registry() -> None:
    pytest.importorskip("jsonargparse")
    from advflow.settings.registry import REWARDS

    table = (DOCS / "rewards.md").read_text().partition("|---|")[2].partition("\n\n")[0]
    named = [row.partition("`")[2].partition("`")[0] for row in table.split("\n")[1:]]
    assert named == [*REWARDS, "module:Class"]


def load(name: str) -> Any:
    return json.loads((RESULTS / name).read_text())


METHODS = {  # of the table in docs/learning.md: the label of its runs
    "AdvantageFlow": ("learning-cpu-2core.json", "gamma 1.1, lambda 0.01 (default)"),
    "Flow-GRPO": ("learning-algorithms-cpu-2core.json", "Flow-GRPO (default)"),
    "Reward-weighted": ("learning-algorithms-cpu-2core.json", "reward-weighted, kl_weight 30 (stopped)"),
}


def test_the_table_of_methods_is_that_of_the_files() -> None:
    table = (DOCS / "learning.md").read_text().partition("<!-- methods -->")[2].partition("<!-- /methods -->")[0]
    rows = [line.strip("| ").split(" | ") for line in table.strip().split("\n")[2:]]
    assert [row[0] for row in rows].count("AdvantageFlow") == 3
    for method, seed, *numbers in rows:
        file, label = METHODS.get(method, ("learning-algorithms-cpu-2core.json", f"{method} (default, stopped)"))
        (run,) = (run for run in load(file) if run["label"] == label and str(run["seed"]) == seed)
        scores = run["held_out"]
        expected = [f"{run['iterations'][-1]}", f"{scores[0]:.3f}", f"{scores[-1]:.3f}"]
        assert numbers == [*expected, f"{scores[-1] - scores[0]:+.3f}", f"{max(scores):.3f}"], (method, seed)


def test_the_table_of_throughput_is_that_of_the_file() -> None:
    table = (DOCS / "throughput.md").read_text().partition("<!-- reweight -->")[2].partition("<!-- /reweight -->")[0]
    rows = [line.strip("| ").split(" | ") for line in table.strip().split("\n")[2:]]
    assert rows == [
        [f"{run['stochastic_steps']}", *(f"{each:.2f} s" for each in run["seconds"].values()), f"{run['speedup']:.2f}x"]
        for run in load("reweight-cpu.json")["results"]
    ]
    table = (DOCS / "throughput.md").read_text().partition("<!-- reweight-gpu -->")[2].partition("<!-- /")[0]
    lines = [line.strip("| ").split(" | ") for line in table.strip().split("\n")[2:]]
    measured = load("nvidia-h200/reweight-sd35.json")["rows"]
    assert f"| {lines[1][1]} images/s | {lines[0][1]}: a second pass" in readme_row("learning from images as they are")
    assert [line[0].removeprefix("with a ") for line in lines] == list(measured)
    for (_, *numbers), rows in zip(lines, measured.values(), strict=True):
        rollout, training = (median(row[f"seconds_{part}"] for row in rows[1:]) for part in ("rollout", "train"))
        assert numbers == [
            f"{32 / (rollout + training):.1f}",
            f"{rollout + training:.2f} s",
            f"{rollout:.2f}, {training:.2f} s",
            f"{rows[1]['gigabytes']:.1f} GB",
        ]


def readme_row(beginning: str) -> str:
    (row,) = (line for line in (ROOT / "README.md").read_text().split("\n") if line.startswith(f"| {beginning}"))
    return row


def test_the_readmes_table_is_that_of_the_files() -> None:
    runs = [run["held_out"] for run in load("learning-cpu-2core.json") if run["label"].endswith("(default)")]
    assert f"{', '.join(f'{scores[-1]:.3f}' for scores in runs)} | {runs[0][0]:.3f} before" in readme_row("the demo's")

    rows = [row for row in load("exactness-cpu.json")["results"] if row["target"] == 1e-9 and "schedule" not in row]
    masks = {row["method"]: f"{100 * row['wrong_masks']:.2g}" for row in rows}
    masked = f"| {masks['ours']} | {masks['log_probs']} %: fp32 log-probabilities subtracted; {masks['bf16_means']} %"
    assert masked in readme_row("wrong Flow-DPPO masks")

    for name, beginning, ours, stock in (
        ("step.json", "an RL step", "ours+graph", "stock+graph"),
        ("step.json", "the same without graphs", "ours", "stock"),
        ("step-compiled.json", "on another, stock with its blocks compiled", "ours+graph", "compile"),
    ):
        results = {result["variant"]: result for result in load(f"nvidia-h200/{name}")["results"]}
        speeds = [f"{results[variant]['images_per_second']['step']:.1f}" for variant in (ours, stock)]
        memory = [
            f"{(results[variant]['held_bytes'] + results[variant]['peak_extra_bytes']) / 2**30:.1f} GiB"
            for variant in (ours, stock)
        ]
        row = readme_row(beginning)
        assert f"| {speeds[0]} images/s" in row and f"| {speeds[1]}" in row, beginning
        assert "GiB" not in row or f"images/s, {memory[0]} | {speeds[1]}, {memory[1]}" in row, beginning

    for shape, beginning in (([256, 16, 64, 64], "AdvantageFlow's loss, 256"), ([8, 16, 64, 64], "with 8 latents")):
        (case,) = (
            result["implementations"]
            for result in load("nvidia-h200/bench.json")["results"]
            if result["case"]["op"] == "advantage_flow_loss" and result["case"]["shape"] == shape
        )
        times = [
            next(each["graph_times"]["median"] for each in case if each["implementation"] == name) * 1e6
            for name in ("ours", "public", "compile")
        ]
        found = [float(word.replace(",", "")) for word in re.findall(r"([\d.,]+) us", readme_row(beginning))]
        assert found == [pytest.approx(time, rel=5e-3) for time in times], beginning
