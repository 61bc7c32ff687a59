"""`advflow report A B`: one page about several runs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("jsonargparse", reason="the trainer's dependencies are not installed")

from advflow.cli import main
from advflow.report import write_comparison
from advflow.report.comparison import titles_of
from advflow.settings.data import RolloutConfig

from tests.trainer.test_report import Page, embedded, make_run


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """One that has ended, one of another algorithm that has not, one before its first evaluation but the base's."""
    return [
        make_run(tmp_path / "long", seed=1),
        make_run(tmp_path / "short", done=25, algorithm="diffusion_nft", rollout=RolloutConfig(prompts=8)),
        make_run(tmp_path / "new", done=0),
    ]


def compare(folders: list[Path], out: Path) -> Page:
    write_comparison(folders, out)
    return Page(out.read_text(encoding="utf-8"))


def test_each_is_a_row_the_best_first(runs: list[Path], tmp_path: Path) -> None:
    page = compare(runs, tmp_path / "page.html")
    assert (
        "long advantage_flow 40 5,120 1 h 02 min 0.300 0.500 +0.200 0.500 at 40 "
        "short diffusion_nft 25 of 40 1,600 1 min 45 s 0.300 0.400 +0.100 0.400 at 20 "
        "new advantage_flow 0 of 40 0 – 0.300 0.300 +0.000 0.300 at 0"
    ) in page.text


def test_scores_stand_over_the_images_that_each_has_drawn(tmp_path: Path) -> None:
    """A run that draws twice as many images an iteration has its points twice as far apart."""
    fast = make_run(tmp_path / "fast", iterations=20)
    rows = [json.loads(line) for line in (fast / "evals.jsonl").read_text().splitlines()]
    (fast / "evals.jsonl").write_text("".join(json.dumps(row | {"images": 2 * row["images"]}) + "\n" for row in rows))
    chart = embedded(compare([make_run(tmp_path / "slow"), fast], tmp_path / "page.html"))["held_out"]
    assert chart["x"] == [0, 1280, 2560, 3840, 5120] and chart["x_name"] == "images"
    assert {each["name"]: each["values"] for each in chart["series"]} == {
        "slow": [0.3, 0.35, 0.4, 0.45, 0.5],
        "fast": [0.3, None, 0.35, None, 0.4],
    }


def test_a_line_goes_on_where_only_the_other_run_was_evaluated(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "one"), make_run(tmp_path / "two")]
    rows = (runs[1] / "evals.jsonl").read_text().splitlines()
    (runs[1] / "evals.jsonl").write_text("\n".join([rows[0], rows[-1]]) + "\n")
    write_comparison(runs, tmp_path / "page.html")
    paths = re.findall(r'data-series="1"><path class="line" d="([^"]+)"', (tmp_path / "page.html").read_text())
    assert paths[0].count("M") == 1 and paths[0].count("L") == 1


def test_metrics_of_two_or_more_are_laid_over_each_other(runs: list[Path], tmp_path: Path) -> None:
    page = compare(runs, tmp_path / "page.html")
    charts = embedded(page)
    assert charts["metric/grad_norm"]["series"][0]["values"][:2] == [0.23, 0.23]
    assert [each["name"] for each in charts["metric/reward"]["series"]] == ["long", "short", "new"]
    assert charts["metric/reward"]["series"][1]["values"][25:] == [None] * 15
    assert "metric/nonconvex_samples" not in charts  # zero everywhere
    assert "metric/seconds_train" not in charts  # of machines, not of runs


def test_only_settings_that_differ_are_listed(runs: list[Path], tmp_path: Path) -> None:
    text = compare(runs, tmp_path / "page.html").text
    settings = text[text.index("Those in which they differ") :]
    assert "seed 1 0 0" in settings and "rollout.prompts 16 8 16" in settings
    assert "algorithm advantage_flow diffusion_nft advantage_flow" in settings
    assert "version of torch 2.13.0 – –" in settings and "optim.lr" not in settings
    twins = [make_run(tmp_path / name) for name in ("a", "b")]
    assert "Settings All have the same." in compare(twins, tmp_path / "same.html").text


def test_the_page_asks_nobody_and_is_the_same_again(runs: list[Path], tmp_path: Path) -> None:
    page = compare(runs, tmp_path / "page.html")
    addresses = [value for _, found in page.elements for key in ("src", "href") if (value := found.get(key))]
    assert len(addresses) > 3 and all(address.startswith("data:") for address in addresses)
    first = (tmp_path / "page.html").read_bytes()
    compare(runs, tmp_path / "page.html")
    assert (tmp_path / "page.html").read_bytes() == first


def test_names_are_as_long_as_it_takes_to_tell_them_apart(tmp_path: Path) -> None:
    assert titles_of([tmp_path / "a" / "run", tmp_path / "b" / "run"]) == ["a/run", "b/run"]
    assert titles_of([tmp_path / "a", tmp_path / "b"]) == ["a", "b"]
    with pytest.raises(ValueError, match="name one folder twice"):
        titles_of([tmp_path / "a", tmp_path / "b" / ".." / "a"])


def test_names_and_settings_are_text_alone(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "<b>bold"), make_run(tmp_path / "plain", rollout=RolloutConfig(solver="dpm"))]
    page = compare(runs, tmp_path / "page.html")
    assert "<b>bold" in page.text and "rollout.solver euler dpm" in page.text


def test_the_command_compares_several_and_reports_one(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    main(["report", "long", "short"])
    assert capsys.readouterr().out == "comparison: comparison.html\n"
    assert "2 runs" in Page((tmp_path / "comparison.html").read_text()).text
    main(["report", "long", "--run", "new", "--out", "other.html"])
    assert "2 runs" in Page((tmp_path / "other.html").read_text()).text
    main(["report", "long"])
    assert (tmp_path / "long" / "report.html").is_file()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "no run is named; accepted: the folder of a run, or of several to compare"),
        (["long", "nothing"], "'nothing' is not the folder of a run"),
        (["long", "long"], "name one folder twice"),
        (["long", "short", "--out", "page.png"], r"--out is 'page.png'; accepted is a file ending in .html"),
        (
            ["long", "short", "--out", "no/page.html"],
            r"--out is 'no/page.html'; accepted is a file ending in .html in a",
        ),
    ],
)
def test_a_mistake_is_a_sentence(
    words: list[str], sentence: str, runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SystemExit, match=f"advflow report: .*{sentence}"):
        main(["report", *words])
    assert sorted(tmp_path.iterdir()) == before
