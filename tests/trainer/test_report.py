"""report.html: what it says, what it leaves to nobody's network, and what broken runs cannot do to it.

One file, for nearly every test reads the page of a run that `make_run` wrote.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from advflow.cli import main
from advflow.report import write_report
from advflow.report.charts import Chart, Series, draw, smooth, tick_text, value_axis
from advflow.report.data import evenly_spaced
from advflow.report.panels import MOST_POINTS, bin_size, binned
from advflow.report.text import duration_text, gain_text, plain, times_text, value_text
from advflow.run.evaluate import Evaluation
from advflow.run.log import RunLog, image_grid
from advflow.settings.config import TrainConfig
from advflow.settings.data import AdvantageConfig, EvalConfig, RolloutConfig
from advflow.settings.methods import FlowGRPOConfig
from advflow.settings.model import ModelConfig
from advflow.settings.processes import SDEConfig
from advflow.settings.registry import METHODS
from PIL import Image

CATEGORIES = ("single_object", "counting", "color_attribution")
COLUMNS = 6
VOID = {"meta", "link", "img", "input", "br", "hr"}


class Page(HTMLParser):
    """Follows the nesting of elements, and keeps what tests ask about."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.data = ""
        self.feed(text)
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["script"]:
            self.data = self.data or data
        elif self.open[-1:] != ["style"]:
            self.texts.append(data)

    def find(self, tag: str, **attributes: str) -> list[dict[str, str | None]]:
        return [found for name, found in self.elements if name == tag and attributes.items() <= found.items()]


def metrics_row(iteration: int, **changes: Any) -> dict[str, Any]:
    row = {
        "reward": 0.5 + 0.002 * iteration + 0.03 * math.sin(7 * iteration),
        "score": 0.3 + 0.001 * iteration,
        "broken_images": 0,
        "uniform_groups": 0.0625,
        "advantage_group_mean_worst": 4e-9,
        "advantage_rms": 0.2,
        "loss": -1e-3 * math.cos(iteration),
        "target_error": 0.62,
        "rollout_deviation": 4e-4,
        "reference_deviation": 0.002 * iteration,
        "min_curvature": 0.43,
        "nonconvex_samples": 0.0,
        "nonfinite_samples": 0.0,
        "grad_norm": 0.23,
        "rollout_policy_rho": min(0.01 * iteration, 0.5),
        "seconds_rollout": 1.5,
        "seconds_train": 2.5,
        "images_per_second": 32.0,
    }
    return {"iteration": iteration} | row | changes


def make_run(folder: Path, iterations: int = 40, done: int | None = None, **config: Any) -> Path:
    """A run's folder, written by what writes real ones; without summary.json where `done` says it is unfinished."""
    settings = TrainConfig(iterations=iterations, out="runs/test", **config)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(asdict(settings), sort_keys=False))
    log = RunLog(folder, 0)
    scores = {}
    for iteration in range((iterations if done is None else done) + 1):
        if iteration % 10 == 0:
            scores = {name: 0.2 + 0.1 * place + 0.005 * iteration for place, name in enumerate(CATEGORIES)}
            images = torch.rand(len(CATEGORIES) * COLUMNS, 3, 8, 8, generator=torch.Generator().manual_seed(iteration))
            overall = sum(scores.values()) / len(scores)
            result = Evaluation(overall, overall, scores, images)
            log.evaluation(iteration, 128 * iteration, 4.25 * iteration, result, list(range(len(images))))
        if iteration < (iterations if done is None else done):
            log.metrics(metrics_row(iteration))
    log.close()
    if done is None:
        versions = {"torch": "2.13.0", "python": "3.11.7"}
        (folder / "summary.json").write_text(
            json.dumps({"seconds": 3723.4, "versions": versions, "commit": "0123abc", "final_categories": scores})
        )
    return folder


def read(folder: Path) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


def embedded(page: Page) -> dict[str, Any]:
    return json.loads(page.data, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_a_finished_run_is_told_in_numbers(tmp_path: Path) -> None:
    page = read(make_run(tmp_path / "sunny"))
    assert "sunny" in page.text and "Finished: 40 iterations" in page.text
    assert "0.300 → 0.500 +0.200" in page.text
    assert "5,120" in page.text and "1 h 02 min" in page.text  # images, wall time
    assert "color attribution 0.400 0.600 +0.200" in page.text
    assert "Zero in every iteration: nonconvex samples, non-finite samples, broken images." in page.text
    assert "commit 0123abc" in page.text and "torch 2.13.0" in page.text
    assert "rollout.images_per_prompt 8" in page.text


def test_nothing_is_fetched_from_anywhere(tmp_path: Path) -> None:
    path = write_report(make_run(tmp_path / "run"))
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    addresses = [value for _, found in page.elements for key in ("src", "href") if (value := found.get(key))]
    assert addresses and all(address.startswith("data:") for address in addresses)
    assert not re.search(r"https?://|@import|url\(", text)
    assert not list(path.parent.glob("*.partial"))


def test_charts_are_drawn_without_the_script(tmp_path: Path) -> None:
    page = read(make_run(tmp_path / "run"))
    data = embedded(page)
    charts = page.find("svg", role="img")
    assert {chart["data-chart"] for chart in charts if "data-chart" in chart} == data.keys()
    assert len(page.find("g", **{"class": "series s1", "data-series": "1"})) == 2  # the wide and the narrow chart
    assert data["held_out"]["x"] == [0, 10, 20, 30, 40]
    assert data["held_out"]["series"][-1]["values"] == [0.3, 0.35, 0.4, 0.45, 0.5]
    lines = [found["d"] for found in page.find("path", **{"class": "line"})]
    assert sum((line or "").startswith("M") for line in lines) > 2 * len(data)


def test_sample_grids_show_first_and_last_with_the_names_of_their_rows(tmp_path: Path) -> None:
    page = read(make_run(tmp_path / "run", iterations=200))
    pictures = page.find("img")
    assert len(pictures) == 12  # of 21
    assert [found["data-label"] for found in pictures if "hidden" not in found] == ["before training", "iteration 200"]
    assert page.find("div", **{"class": "rows"})
    assert pictures[0]["alt"] == "Sample grid, before training; rows: single object, counting, color attribution"


def test_sample_grids_name_their_prompts_in_their_places(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    assert not read(folder).find("table", **{"class": "prompts"})  # a run that did not note them
    prompts = [f"prompt <{row}> {column}" for row in range(len(CATEGORIES)) for column in range(COLUMNS)]
    log = RunLog(folder, 40)
    log.sample_prompts(prompts)
    log.close()
    page = read(folder)
    table = page.text[page.text.index("Their prompts") : page.text.index("Categories Bars")]
    for row, name in enumerate(("single object", "counting", "color attribution")):
        texts = prompts[row * COLUMNS : (row + 1) * COLUMNS]
        assert f"{name} {' '.join(texts)}" in table
    for broken in ("[", "{}", "null", "\xff"):
        (folder / "samples" / "prompts.json").write_text(broken, encoding="latin-1")
        assert not read(folder).find("table", **{"class": "prompts"})


def test_rows_of_prompts_are_numbered_where_categories_differ_in_size(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    (folder / "samples" / "prompts.json").write_text(json.dumps([f"p{i}" for i in range(8)]))
    assert "row 1 p0 p1 row 2 p2 p3 row 3 p4 p5 row 4 p6 p7" in read(folder).text


def test_times_add_up(tmp_path: Path) -> None:
    page = read(make_run(tmp_path / "run"))
    assert "Per iteration 4.00 s 1.50 s rollout + 2.50 s update" in page.text
    assert "Wall time 1 h 02 min 2 min 40 s iterations + 59 min 23 s evaluation and the rest" in page.text
    folder = make_run(tmp_path / "uneven", iterations=3)
    rows = [metrics_row(i, seconds_rollout=r, seconds_train=u) for i, (r, u) in enumerate([(1, 1), (1, 1), (10, 0.07)])]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "Per iteration 4.69 s 4.00 s rollout + 0.69 s update" in read(folder).text
    rows[1].pop("seconds_train")  # not every iteration is timed: nothing is said about the sum
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "evaluation and the rest" not in read(folder).text
    for row in rows:
        row.pop("seconds_rollout")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "Per iteration – Best held-out" in read(folder).text


def test_threads_are_told_where_the_run_noted_them(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    assert "torch 2.13.0 Seed" in read(folder).text
    for threads, text in ((1, "torch 2.13.0, 1 CPU thread Seed"), (2, "torch 2.13.0, 2 CPU threads Seed")):
        summary = json.loads((folder / "summary.json").read_text()) | {"threads": threads}
        (folder / "summary.json").write_text(json.dumps(summary))
        assert text in read(folder).text


@pytest.mark.parametrize(
    ("rollout", "update"), [(0.0, 0.0), (1.005, 2.005), (0.0149, 0.0149), (33.35, 66.55), (250.5, 3.5)]
)
def test_rounded_times_add_up_exactly(rollout: float, update: float) -> None:
    first, second, both = (float(text.removesuffix(" s").replace(",", "")) for text in times_text(rollout, update))
    assert first + second == pytest.approx(both, abs=1e-9)
    assert both == pytest.approx(rollout + update, rel=0.02)


def test_nulls_are_dashes_and_said(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", done=40)
    evals = [json.loads(line) for line in (folder / "evals.jsonl").read_text().splitlines()]
    evals[1]["overall"] = evals[4]["overall"] = evals[4]["categories"]["counting"] = None
    evals[4]["unscored"] = 7
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    metrics[5] |= {"loss": None, "reward": None}
    metrics[9]["loss"] = None
    for name, rows in (("evals.jsonl", evals), ("metrics.jsonl", metrics)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"iteration": 40, "lo')
    page = read(folder)
    assert "0.300 → – Held-out score before training and at iteration 40" in page.text
    assert "The held-out score is not a number in 2 of 5 evaluations, first at iteration 10." in page.text
    left_out = "Held-out images without a finite score, left out of the means, in 1 of 5 evaluations"
    assert f"{left_out}, first in that of iteration 40." in page.text
    assert "Not a number in 2 of 40 iterations, first in 5, and a gap in the chart: reward, loss." in page.text
    assert "counting 0.300 – –" in page.text
    assert embedded(page)["held_out"]["series"][-1]["values"] == [0.3, None, 0.4, 0.45, None]


def test_rows_written_twice_count_once_and_in_order(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", done=3)
    rows = [metrics_row(i, loss=loss) for i, loss in ((0, 1.0), (1, 2.0), (2, 3.0), (1, 4.0))]
    (folder / "metrics.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    data = embedded(read(folder))
    assert (data["loss"]["x"], data["loss"]["series"][0]["values"]) == ([0, 1, 2], [1.0, 4.0, 3.0])


def test_a_file_of_bytes_that_are_no_text_is_read_up_to_them(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", done=3)
    with (folder / "metrics.jsonl").open("ab") as handle:
        handle.write(b"\0\0\xff\xfe\n")
    (folder / "summary.json").write_bytes(b"\xff\xfe{")
    assert "Not finished: iteration 3 of 40" in read(folder).text


def test_every_method_shows_its_own_section(tmp_path: Path) -> None:
    for name, method in METHODS.items():
        family = ModelConfig(family="llamagen" if method.process == "tokens" else "sd3")
        text = read(make_run(tmp_path / name, iterations=1, algorithm=name, model=family)).text
        shown = text[text.index(f"Algorithm {name} ") :]
        for setting, value in asdict(method.settings()).items():  # type: ignore[misc]
            assert value is None or f"{setting} {plain(value)}" in shown, (name, setting)


def test_what_is_compared_with_the_papers_of_the_reverse_process_is_shown(tmp_path: Path) -> None:
    """DanceGRPO and MixGRPO are Flow-GRPO's loss: what makes them different is the sampler and its window."""
    dance = SDEConfig(sampler="dance_sde", noise_level=1.5, steps=3, shared_noise=True, trained_share=0.6)
    advantage = AdvantageConfig(norm="group_std", clip_mode="clip")
    clip = FlowGRPOConfig(clip=0.0128, kl_weight=0.02)
    page = read(make_run(tmp_path / "dance", algorithm="dance_grpo", sde=dance, advantage=advantage, flow_grpo=clip))
    assert (
        "Algorithm dance_grpo clip 0.0128, kl_weight 0.02, kl_convention exact, time_weight none "
        "Sampler steps dance_sde, noise level 1.5 window first, steps 3, branches 1, shift_every 25, "
        "shared_noise True, shared_anchor False, trained_share 0.6, anchor stored, epochs 1, reweight False "
        "Advantages group_std clip 5, clip_mode clip, scale_by_std False"
    ) in page.text
    mix = SDEConfig(window="sliding", steps=2, within=5, shift_every=75)
    page = read(make_run(tmp_path / "mix", algorithm="mix_grpo", sde=mix))
    assert (
        "Sampler steps flow_sde, noise level 0.7 window sliding, steps 2, within 5, branches 1, shift_every 75"
        in page.text
    )


def test_guidance_is_shown_where_there_is_some(tmp_path: Path) -> None:
    assert "Guidance" not in read(make_run(tmp_path / "none")).text
    forward = make_run(tmp_path / "forward", rollout=RolloutConfig(guidance=4.5), evaluation=EvalConfig(guidance=3))
    assert "Guidance 4.5 drawn, 1 learnt, 3 held out" in read(forward).text
    rollout = RolloutConfig(guidance=4.5, negative_prompt="<grey>")
    reverse = make_run(tmp_path / "reverse", algorithm="flow_grpo", rollout=rollout)
    assert "Guidance 4.5 drawn, 4.5 learnt, 1 held out away from <grey>" in read(reverse).text


def test_what_is_compared_with_the_papers_of_the_forward_process_is_shown(tmp_path: Path) -> None:
    page = read(make_run(tmp_path / "run"))
    draws = "Draws of (t, noise) 4 an image noise shared_in_group, timesteps stratified, shift 1, split pairs"
    assert f"{draws} Advantages" in page.text
    assert "Sampler steps" not in page.text


def test_a_run_of_a_plugin_that_is_elsewhere_has_a_report(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config |= {"algorithm": "theirs", "plugins": ["not_here"], "theirs": {"strength": 0.25}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    main(["report", "--run", str(folder)])
    assert "Algorithm theirs strength 0.25 Advantages" in Page((folder / "report.html").read_text()).text


def test_grids_stay_small_whatever_the_resolution(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", iterations=200)
    noise = torch.rand(COLUMNS * len(CATEGORIES), 3, 256, 256, generator=torch.Generator().manual_seed(0))
    *others, first = (folder / "samples").iterdir()
    image_grid(noise, COLUMNS).save(first)
    for path in others:
        path.write_bytes(first.read_bytes())  # packing noise takes half a second
    assert write_report(folder).stat().st_size < 2_000_000  # even of pure noise


def test_rows_are_not_named_where_they_are_not_categories(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    for path in (folder / "samples").iterdir():
        Image.new("RGB", (64, 67)).save(path)
    assert not read(folder).find("div", **{"class": "rows"})


@pytest.mark.parametrize("done", [0, 5, 25])
def test_an_unfinished_run_is_called_so(tmp_path: Path, done: int) -> None:
    page = read(make_run(tmp_path / "run", done=done))
    assert f"Not finished: iteration {done} of 40" in page.text
    assert "They are recorded when the run finishes." in page.text
    assert ("0.300 → –" in page.text) == (done < 10)
    assert ("0.300 → 0.400" in page.text) == (done == 25)
    embedded(page)


def test_a_run_that_was_extended_is_unfinished_again(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump(config | {"iterations": 400}))
    assert "Not finished: iteration 40 of 400" in read(folder).text


def test_a_config_alone_is_a_run_that_has_not_begun(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(asdict(TrainConfig())))
    page = read(tmp_path)
    assert "The run has not been evaluated yet." in page.text
    assert embedded(page) == {}


def test_numbers_that_are_none_leave_gaps_and_are_reported(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", done=20)
    with (folder / "metrics.jsonl").open("a") as handle:
        broken = {"loss": math.nan, "reward": None, "grad_norm": math.inf, "nonfinite_samples": 3.0, "score": "high"}
        handle.write(json.dumps(metrics_row(20, **broken)) + "\n")
        handle.write(json.dumps({"iteration": 21}) + "\n")
        handle.write('{"iteration": 22, "rew')
    with (folder / "evals.jsonl").open("a") as handle:
        handle.write(json.dumps({"iteration": 21, "overall": math.nan, "categories": None}) + "\n")
    path = write_report(folder)
    data = embedded(Page(path.read_text()))
    assert data["loss"]["series"][0]["values"][-2:] == [None, None]
    assert data["reward"]["x"][-1] == 21
    text = Page(path.read_text()).text
    where = "dropped by the loss, of all in the iteration"
    assert f"Non-finite samples ({where}) in 1 of 22 iterations, first in 20." in text
    assert not re.search(r"\bnan\b|\binf\b|None", text)


def test_metrics_of_nothing_but_nan_are_drawn_empty(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", done=3)
    rows = [dict.fromkeys(metrics_row(0), math.nan) | {"iteration": i} for i in range(3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "no values yet" in read(folder).text


def test_a_fall_from_the_best_score_is_said(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    rows = [json.loads(line) for line in (folder / "evals.jsonl").read_text().splitlines()]
    rows[-1]["overall"] = 0.1
    (folder / "evals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = read(folder)
    assert "The held-out score fell by 0.350 after its best, 0.450 at iteration 30." in page.text
    assert "−0.200" in page.text


def test_metrics_it_does_not_know_are_shown_under_their_names(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", done=0)
    (folder / "metrics.jsonl").write_text(json.dumps(metrics_row(0, brand_new=1.5)) + "\n")
    page = read(folder)
    assert "brand new" in page.text and "brand_new" in embedded(page)


def test_names_and_settings_cannot_become_markup(tmp_path: Path) -> None:
    evil = "</script><script>alert(\"1\")</script><img src=x onerror='alert(2)'>&amp;"
    folder = make_run(tmp_path / "<b>run&", done=10)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["model"]["pipeline"] = config["seed"] = config[evil] = evil
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    for name, changes in (("evals.jsonl", {"categories": {evil: 0.5}}), ("metrics.jsonl", {evil: 1.0})):
        rows = [json.loads(line) | changes for line in (folder / name).read_text().splitlines()]
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "summary.json").write_text(json.dumps({"versions": {evil: evil}, "commit": evil, "device": evil}))
    page = read(folder)
    assert len(page.find("script")) == 2
    assert all("onerror" not in found for _, found in page.elements)
    assert evil in page.text
    assert evil in embedded(page)


def test_the_same_files_give_the_same_page(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    first = write_report(folder).read_bytes()
    assert write_report(folder).read_bytes() == first


def test_a_long_run_makes_no_big_page(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", iterations=20_000, done=0)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(metrics_row(i)) + "\n" for i in range(7_001)))
    path = write_report(folder)
    assert path.stat().st_size < 1_000_000
    page = Page(path.read_text())
    assert "Each point stands for 15 iterations." in page.text
    assert len(embedded(page)["loss"]["x"]) == len(embedded(page)["loss"]["series"][0]["values"]) <= MOST_POINTS


def test_a_sample_grid_that_is_being_written_is_left_out(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    last = folder / "samples" / "000040.png"
    last.write_bytes(last.read_bytes()[:60])
    (folder / "samples" / "notes.png").write_bytes(b"")
    assert [found["data-label"] for found in read(folder).find("img")][-1] == "iteration 30"


def test_what_is_no_run_is_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"'.*nowhere' is not the folder of a run: there is no .*config\.yaml"):
        write_report(tmp_path / "nowhere")
    (tmp_path / "config.yaml").write_text("a: [1")
    with pytest.raises(ValueError, match="is not valid YAML"):
        write_report(tmp_path)
    for content in ("learning_rate: 1.0", "iterations: 0", "iterations: true", "iterations: many", ""):
        (tmp_path / "config.yaml").write_text(content)
        with pytest.raises(ValueError, match="does not say how many iterations"):
            write_report(tmp_path)
    for raw, sentence in ((b"- 1\n", "which holds a list"), (b"a: gr\xfcn", "which is not UTF-8 .byte 0xfc in line 1")):
        (tmp_path / "config.yaml").write_bytes(raw)
        with pytest.raises(ValueError, match=f"the config of a run is '.*config.yaml', {sentence}"):
            write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ([0.0, 1.0], ["0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        ([0.5, 0.52], ["0.500", "0.505", "0.510", "0.515", "0.520"]),
        ([-2e-9, 4e-9], ["−2e-9", "0", "2e-9", "4e-9"]),
        ([0.0, 0.0], ["0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        ([0.2, 0.2 + 1e-8], ["0", "0.2", "0.4"]),
        ([0.0, 1e6], ["0", "2e5", "4e5", "6e5", "8e5", "1e6"]),
        ([], ["0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
    ],
)
def test_axes_have_round_ticks(values: list[float], texts: list[str]) -> None:
    ticks, low, high = value_axis(values, 5 if len(texts) > 4 else 3)
    assert [tick_text(tick, ticks) for tick in ticks] == texts
    assert low <= min(values, default=0) and high >= max(values, default=1) * (1 - 1e-6)


def test_a_gap_interrupts_the_line_and_a_lone_value_is_a_dot() -> None:
    chart = Chart("k", "label", [0, 1, 2, 3, 4], [Series("s", [1.0, 2.0, None, 1.5, None])])
    line = next(found["d"] for found in Page(draw(chart, 300, 200)).find("path", **{"class": "line"}))
    assert line is not None and line.count("M") == 2 and line.count("L") == 1 and line.endswith("h0")


def test_names_at_the_ends_of_lines_do_not_overlap() -> None:
    series = [Series(f"line {i}", [0.5, 0.5 + 1e-3 * i], i) for i in range(8)]
    chart = Chart("k", "label", [0, 1], series, end_labels=True)
    heights = sorted(float(found["y"] or 0) for found in Page(draw(chart, 900, 400)).find("text", **{"class": "name"}))
    assert len(heights) == 8
    assert min(after - before for before, after in itertools.pairwise(heights)) >= 14.9


def test_smoothing_starts_at_the_first_value_and_keeps_gaps() -> None:
    assert smooth([2.0, None, 2.0]) == [2.0, None, pytest.approx(2.0)]
    assert smooth([0.0, 1.0], weight=0.5) == [0.0, pytest.approx(2 / 3)]


def test_long_columns_are_binned() -> None:
    assert bin_size(MOST_POINTS) == 1 and bin_size(MOST_POINTS + 1) == 2
    assert binned([1.0, 3.0, None, None, 5.0], 2) == [2.0, None, 5.0]
    assert binned([1.0, 3.0, None, 2.0], 2, max) == [3.0, 2.0]


def test_texts() -> None:
    assert [duration_text(t) for t in (None, 4.723, 62, 3723.4)] == ["–", "4.72 s", "1 min 02 s", "1 h 02 min"]
    assert [value_text(v) for v in (None, 0.0, -3.2e-7, 1234.5, 54321.0)] == ["–", "0", "−3.20e-7", "1,234", "54,321"]
    assert (gain_text(0.3, 0.25), gain_text(None, 0.25)) == ("−0.050", "–")
    assert evenly_spaced(range(21), 3) == [0, 10, 20]
