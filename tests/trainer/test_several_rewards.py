"""Several rewards in a run: how they are named, what becomes of them, what is logged of each."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from advflow.cli import _parse, main
from advflow.report import write_report
from advflow.rewards import CheckedReward, Prompt, Scores, load_reward
from advflow.rewards.several import Rewards, load_rewards
from advflow.run.log import EVALS, METRICS
from advflow.settings.data import DataConfig
from advflow.settings.numbers import WrongSetting
from advflow.settings.sources import to_config, train_parser
from advflow.world.scene import Placed, render
from PIL import Image

import advflow_ext as af
from tests.trainer.runs import SMALL, assert_same_run, rows
from tests.trainer.test_ranks import METHODS, train_together
from tests.trainer.test_ranks import WORDS as TOGETHER

NAN = math.nan


def config_of(*words: str) -> Any:
    arguments = _parse(["train", *words]).train
    for name in ("resume", "config"):
        arguments.pop(name)
    return to_config(train_parser(), arguments)


def test_rewards_are_named_in_a_file_or_on_the_command_line_and_the_last_word_counts(tmp_path: Path) -> None:
    file = tmp_path / "several.yaml"
    file.write_text(
        "data:\n  reward:\n    redness: 1\n    text: {reward: ocr, weight: 0.5, batch: 4}\n"
        "    mine: {reward: 'my.module:Mine', weight: 0, args: {x: 1}}\n    compressibility:\n"
    )
    rewards = config_of("--config", str(file)).data.rewards
    assert {name: (each.reward, each.weight, each.batch, each.args) for name, each in rewards.items()} == {
        "redness": ("redness", 1, None, {}),
        "text": ("ocr", 0.5, 4, {}),
        "mine": ("my.module:Mine", 0, None, {"x": 1}),
        "compressibility": ("compressibility", 1.0, None, {}),
    }
    for words in (["--config", str(file), "--data.reward", "redness"], ["--data.reward", "redness"]):
        assert list(config_of(*words).data.rewards) == ["redness"]
    assert config_of("--data.reward", "{redness: 2.5, embedded: 1}").data.reward == {"redness": 2.5, "embedded": 1}
    assert list(config_of("--config", "sd35_medium", "--config", str(file)).data.rewards)[0] == "redness"
    alone = config_of("--data.reward", "pickscore", "--data.reward_args.model", "x").data
    assert alone.rewards["pickscore"].args == {"model": "x"} and alone.rewards["pickscore"].weight == 1.0


@pytest.mark.parametrize(
    ("reward", "arguments", "sentence"),
    [
        ({}, {}, "data.reward is {}; accepted: a name, or one reward or more by their names"),
        ("{redness:1}", {}, "data.reward is '{redness:1}'; accepted: a name, or several, with a space behind"),
        ({"redness": 0}, {}, "data.reward is {'redness': 0}; accepted: one reward or more whose weight is not 0, "),
        ({"my.module:Mine": 1}, {}, "data.reward is 'my.module:Mine'; accepted: names of letters, digits and undersco"),
        ({"redness": "much"}, {}, "data.reward.redness is 'much'; accepted: a weight, or a mapping of reward, "),
        ({"redness": True}, {}, "data.reward.redness is True; accepted: a weight, or a mapping"),
        ({"redness": NAN}, {}, "data.reward.redness.weight is nan; accepted: a finite number"),
        ({"redness": {"weight": "1"}}, {}, "data.reward.redness.weight is '1'; accepted: a finite number"),
        ({"redness": {"batch": 0}}, {}, "data.reward.redness.batch is 0; accepted: 1 or more, or null"),
        ({"redness": {"args": 1}}, {}, "data.reward.redness.args is 1; accepted: a mapping of what its class is made "),
        ({"redness": {"reward": 1}}, {}, "data.reward.redness.reward is 1; accepted: a name, as data.reward takes alo"),
        ({"a": {"wieght": 1}}, {}, "there is no setting data.reward.a.wieght; did you mean 'weight'? data.reward.a ha"),
        ({"redness": 1}, {"x": 1}, "data.reward_args is {'x': 1}; accepted: none where data.reward names several, who"),
    ],
)  # fmt: skip
def test_what_names_no_rewards_is_a_sentence(reward: Any, arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(WrongSetting) as caught:
        DataConfig(reward=reward, reward_args=arguments)
    assert str(caught.value).startswith(sentence)


@pytest.mark.parametrize(
    ("reward", "sentence"),
    [
        ({"rednes": 1}, "data.reward.rednes is 'rednes'; did you mean 'redness'? accepted: 'embedded', "),
        ({"a": {"reward": "beauty"}}, "data.reward.a.reward is 'beauty'; accepted: 'embedded', "),
        ({"redness": {"args": {"x": 1}}}, "there is no data.reward.redness.args.x; reward 'redness' takes no arg"),
        ({"a": {"reward": "aesthetic"}}, "data.reward.a.args.weights is missing; reward 'aesthetic' takes weights: "),
    ],
)  # fmt: skip
def test_one_of_several_that_cannot_be_made_is_named_by_its_place(reward: Any, sentence: str) -> None:
    with pytest.raises(ValueError) as caught:
        load_rewards(DataConfig(reward=reward), lambda name: None)
    assert str(caught.value).startswith(sentence)


class Fixed:
    """Gives each image the value of its prompt's metadata under its name."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, images: torch.Tensor, prompts: list[Prompt]) -> Scores:
        values = torch.tensor([prompt.metadata[self._name] for prompt in prompts], dtype=torch.float64)
        return Scores(values, values * 10)


def fixed(**weights: float) -> Rewards:
    return Rewards({name: CheckedReward(Fixed(name)) for name in weights}, weights)


A = [0.1, 0.7, 0.2, 0.3, 0.4, 0.4, 0.4, 0.4]  # the second prompt's images are alike to this reward
B = [5.0, -3.0, 2.0, 8.0, 1.0, 2.0, 3.0, 6.0]
IMAGES = torch.zeros(8, 3, 2, 2)
PROMPTS = [Prompt("x", metadata={"a": a, "b": b}) for a, b in zip(A, B, strict=True)]


def normalised(values: list[float], group: int = 4) -> torch.Tensor:
    groups = torch.tensor(values, dtype=torch.float32).double().view(-1, group)
    centred = groups - groups.mean(1, keepdim=True)
    return (centred / (groups.std(1, correction=0, keepdim=True) + 1e-4)).flatten()


def test_the_weighted_sum_is_exact() -> None:
    rewards = fixed(a=0.3, b=-2.0)
    scores = rewards(IMAGES, PROMPTS)
    assert scores.reward.tolist() == torch.tensor([A, B]).T.tolist()
    of_fp32 = zip(*torch.tensor([A, B]).tolist(), strict=True)
    expected = torch.tensor([0.3 * a + -2.0 * b for a, b in of_fp32], dtype=torch.float64).float()
    assert torch.equal(rewards.combine(scores.reward, 4, "weighted_sum"), expected)
    assert torch.equal(rewards.total(scores.reward), expected)
    alone = fixed(a=1.0)
    assert torch.equal(alone.combine(alone(IMAGES, PROMPTS).reward, 4, "weighted_sum"), torch.tensor(A))


def test_gdpo_normalises_each_in_its_group_and_then_sums() -> None:
    rewards = fixed(a=0.3, b=2.0)
    combined = rewards.combine(rewards(IMAGES, PROMPTS).reward, 4, "gdpo")
    torch.testing.assert_close(combined.double(), 0.3 * normalised(A) + 2.0 * normalised(B), rtol=1e-6, atol=1e-7)
    # Then the batch: its mean is 0 by now, its deviation becomes 1 (arXiv 2601.05242).
    advantages = af.group_advantages(combined, 4, norm="batch_rms", clip=None)
    expected = 0.3 * normalised(A) + 2.0 * normalised(B)
    expected = (expected - expected.mean()) / expected.std(correction=0)
    torch.testing.assert_close(advantages.double(), expected, rtol=1e-5, atol=1e-6)


def test_worst_first_is_the_smallest_of_the_normalised_rewards() -> None:
    rewards = fixed(a=1.0, b=2.0)
    combined = rewards.combine(rewards(IMAGES, PROMPTS).reward, 4, "worst_first")
    expected = torch.minimum(normalised(A), 2.0 * normalised(B))
    torch.testing.assert_close(combined.double(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("rule", ["gdpo", "worst_first"])
def test_the_unit_of_a_reward_does_not_matter_once_it_is_normalised(rule: Any) -> None:
    rewards = fixed(a=1.0, b=1.0)
    reward = torch.tensor([[0.1, 0.7, 0.2, 0.3], [5.0, -3.0, 2.0, 8.0]], dtype=torch.float64).T
    combined = rewards.combine(reward, 4, rule)
    other = rewards.combine(reward * torch.tensor([1.0, 1000.0]) + torch.tensor([7.0, -1.0]), 4, rule)
    torch.testing.assert_close(combined, other, rtol=1e-3, atol=1e-3)
    plain = rewards.combine(reward * torch.tensor([1.0, 1000.0]), 4, "weighted_sum")
    assert plain.argsort().tolist() != combined.argsort().tolist()


@pytest.mark.parametrize("rule", ["weighted_sum", "gdpo", "worst_first"])
@pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf])
def test_an_image_that_one_reward_cannot_score_is_unscored_and_counts_nowhere(rule: Any, bad: float) -> None:
    rewards = fixed(a=1.0, b=1.0)
    reward = torch.tensor([A, B]).T.contiguous()
    reward[1, 1] = bad
    combined = rewards.combine(reward, 4, rule)
    assert combined.isnan().nonzero().flatten().tolist() == [1]
    # The others are what they would be had the image, with its good reward, not been there.
    rest = [0, 2, 3]
    expected = rewards.combine(reward[rest], 3, rule)
    torch.testing.assert_close(combined[rest], expected, rtol=1e-6, atol=1e-7)
    row = rewards.means(reward, torch.zeros(8, dtype=torch.bool))
    assert row["unscored/a"] == 0 and row["unscored/b"] == 1
    assert row["reward/b"] == pytest.approx((sum(B) + 3.0) / 7)


def test_a_reward_without_a_weight_is_left_out_of_all_but_reports() -> None:
    rewards = fixed(a=0.0, b=2.0)
    reward = torch.tensor([[NAN] * 4, [1.0, 2.0, 3.0, 4.0]]).T
    assert rewards.total(reward).tolist() == [2.0, 4.0, 6.0, 8.0]
    learnt = rewards.learnt()
    assert (rewards.names, learnt.names) == (["a", "b"], ["b"]) and learnt.means(reward[:, 1:], reward[:, 0] > 0) == {}


def test_each_reward_sees_its_own_number_of_images_at_a_time() -> None:
    seen: dict[str, list[int]] = {"own": [], "set": [], "neither": []}

    def watched(name: str, **attributes: int) -> Any:
        def call(self: object, images: torch.Tensor, prompts: list[Prompt]) -> Scores:
            seen[name].append(len(images))
            return Scores(images.mean((1, 2, 3)), images.mean((1, 2, 3)))

        return type(name, (), {"__call__": call, **attributes})()

    own = CheckedReward(watched("own", batch=100))
    rewards = {"own": own, "set": CheckedReward(watched("set", batch=100), 1000), "neither": None}
    rewards["neither"] = CheckedReward(watched("neither"))
    images = torch.rand(2048, 3, 1, 1)
    scores = Rewards(rewards, dict.fromkeys(rewards, 1.0))(images, [Prompt("x")] * 2048)
    assert seen == {"own": [100] * 20 + [48], "set": [1000, 1000, 48], "neither": [128] * 16}
    assert torch.equal(scores.reward, images.mean((1, 2, 3))[:, None].expand(2048, 3))
    with pytest.raises(ValueError, match="reward .*wrong has batch = 0; accepted is how many images it scores"):
        CheckedReward(watched("wrong", batch=0))


SEVERAL = "{redness: 1.0, compressibility: 0.25, embedded: 0}"


def test_a_run_of_several_logs_reports_and_resumes_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    words = ["train", *SMALL, "--optim.decay", "none", "--data.reward", SEVERAL, "--advantage.combine", "gdpo"]
    main([*words, "--out", str(whole), "--iterations", "2"])
    printed = capsys.readouterr().out
    main([*words, "--out", str(halves), "--iterations", "1"])
    main(["train", "--out", str(halves), "--resume", "--iterations", "2"])
    assert_same_run(halves, whole)
    refusal = r"started with other settings: data.reward is 'embedded' and was \{'redness': 1.0, .*'embedded': 0\};"
    with pytest.raises(SystemExit, match=refusal):
        main(["train", "--out", str(halves), "--resume", "--data.reward", "embedded"])
    assert yaml.safe_load((whole / "config.yaml").read_text())["data"]["reward"] == yaml.safe_load(SEVERAL)
    for row in rows(whole, METRICS):
        assert {key for key in row if "/" in key} == {
            f"{what}/{name}" for what in ("reward", "unscored") for name in ("redness", "compressibility")
        }
        total = row["reward/redness"] + 0.25 * row["reward/compressibility"]
        assert row["reward"] == pytest.approx(total, rel=1e-5)
    for row in rows(whole, EVALS):
        each = row["rewards"]
        assert list(each) == ["redness", "compressibility", "embedded"] and each["embedded"]["unscored"] == 0
        assert row["overall"] == pytest.approx(each["redness"]["overall"] + 0.25 * each["compressibility"]["overall"])
        assert each["redness"]["categories"].keys() == row["categories"].keys()
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["final_rewards"]["embedded"] == rows(whole, EVALS)[-1]["rewards"]["embedded"]["overall"]
    assert "  reward compressibility -" in printed
    page = write_report(whole).read_text()
    charts = json.loads(page.partition('id="data">')[2].partition("</script>")[0])
    for name in ("held_out/redness", "held_out/embedded", "reward/redness", "reward/compressibility"):
        assert name in charts
    assert charts["held_out/redness"]["series"][0]["values"][0] == pytest.approx(
        rows(whole, EVALS)[0]["rewards"]["redness"]["overall"], rel=1e-4
    )
    assert "unscored by redness, unscored by compressibility" in page and "reward/embedded" not in charts


def test_processes_combine_what_the_whole_batch_has() -> None:
    words = [*TOGETHER, *METHODS["advantage_flow"], "--data.reward", SEVERAL, "--advantage.combine", "gdpo"]
    ((alone, evaluation, weights),) = train_together(1, words)
    for its_rows, its_evaluation, its_weights in train_together(2, words):
        for row, its in zip(alone, its_rows, strict=True):
            for key in ("reward", "reward/redness", "reward/compressibility", "unscored/redness", "advantage_rms"):
                assert its[key] == pytest.approx(row[key], rel=1e-5, abs=1e-5), key
        torch.testing.assert_close(its_weights, weights, rtol=1e-5, atol=1e-5)
        for name, each in evaluation.each.items():
            assert its_evaluation.each[name].overall == pytest.approx(each.overall, abs=1e-5)


def test_redness_is_red_less_the_mean_of_the_others() -> None:
    colors = {(1, 0, 0): 1.0, (0, 1, 0): -0.5, (0, 0, 1): -0.5, (0.5, 0.5, 0.5): 0.0, (1, 1, 0): 0.5, (0, 1, 1): -1.0}
    images = torch.stack([torch.tensor(color).view(3, 1, 1).expand(3, 4, 4) for color in colors])
    scores = load_reward("redness")(images, [Prompt("x")] * len(colors))
    assert scores.reward.tolist() == pytest.approx(list(colors.values())) == scores.score.tolist()


def test_compressibility_is_the_negative_size_of_a_jpeg_file_in_kilobytes() -> None:
    images = torch.stack(
        [torch.full((3, 32, 32), 0.5), torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))]
    )
    sizes = []
    for image in images:
        file = io.BytesIO()
        Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()).save(file, "jpeg", quality=95)
        sizes.append(len(file.getvalue()) / 1000)
    prompts = [Prompt("x")] * 2
    assert load_reward("incompressibility")(images, prompts).reward.tolist() == pytest.approx(sizes)
    assert load_reward("compressibility")(images, prompts).reward.tolist() == pytest.approx([-size for size in sizes])
    assert 0.6 < sizes[0] < 0.8 and 1.5 < sizes[1] < 3.5


def test_the_easy_rewards_conflict_with_what_a_prompt_asks_for() -> None:
    """A blue circle, a red one and an empty image for 'a blue circle': each reward has its own favourite."""
    scenes = [[Placed("circle", color, 16.0, 16.0, 8.0)] for color in ("blue", "red")] + [[]]
    images = torch.stack([torch.from_numpy(render(scene)) for scene in scenes])
    prompts = [Prompt("a blue circle", "colors")] * 3
    favourites = {
        name: int(load_reward(name)(images, prompts).reward.argmax())
        for name in ("embedded", "redness", "compressibility")
    }
    assert favourites == {"embedded": 0, "redness": 1, "compressibility": 2}


def test_a_combination_is_one_of_three(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--advantage.combine", "sum"])
    accepted = "advantage.combine is 'sum'; accepted: 'weighted_sum', 'gdpo' or 'worst_first'"
    assert accepted in capsys.readouterr().err
