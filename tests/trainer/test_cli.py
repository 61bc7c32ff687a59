"""The command line: settings, their errors, and every subcommand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from advflow.cli import main
from advflow.models.sd3 import pipeline_folder
from advflow.rewards import Prompt, Scores, load_reward
from advflow.run.trainer import Trainer
from advflow.settings.config import TrainConfig
from advflow.settings.sources import (
    algorithm_settings,
    load_run_config,
    packaged_configs,
    resolve_configs,
    to_config,
    train_parser,
)
from PIL import Image

from tests.trainer.runs import OF_FLOWS

SMALL = (
    "--iterations 2 --rollout.prompts 2 --rollout.images_per_prompt 3 --rollout.steps 2 --draws.per_image 1 "
    "--evaluation.prompts_per_category 1 --evaluation.steps 2 --checkpoint_every 1"
).split()


def _parse(*words: str) -> TrainConfig:
    parser = train_parser()
    return to_config(parser, parser.parse_args(list(words)))


def test_the_default_is_the_tiny_config() -> None:
    assert _parse() == TrainConfig()
    assert _parse("--config", str(packaged_configs()["tiny"])) == TrainConfig()


def test_dotted_overrides_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("advantage_flow:\n  gamma: 2.0\n  lam: 0.5\n")
    config = _parse("--config", str(file), "--advantage_flow.gamma", "1-A")
    assert (config.advantage_flow.gamma, config.advantage_flow.lam) == ("1-A", 0.5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--advantage_flow.gama", "1"], "advantage_flow.gama"),
        (["--advantage_flow.weighting", "cubic"], "advantage_flow.weighting"),
        (["--flow_awr.weighting", "t2"], "flow_awr.weighting"),
        (
            ["--advantage.scale_by_std", "true"],
            "advantage.scale_by_std is True; accepted: False, or advantage.norm softmax",
        ),
        (["--advantage_flow.gamma", "-1"], "advantage_flow.gamma is -1"),
        (["--optim.lr", "fast"], "optim.lr"),
        (["--optim.lr", "0"], "optim.lr is 0"),
        (["--rollout.images_per_prompt", "1"], "rollout.images_per_prompt is 1"),
        (["--optim.steps_per_iteration", "3"], "optim.steps_per_iteration is 3"),
        (["--data.reward", "beauty"], "data.reward is 'beauty'"),
        (["--data.reward", "no.such:Thing"], "data.reward 'no.such:Thing'"),
        (["--data.prompts", "nowhere.txt"], "data.prompts is 'nowhere.txt'"),
        (["--model.resolution", "33"], "model.resolution is 33"),
        (["--algorithm", "flow_gpo"], "algorithm"),
        (["--algorithm", "flow_grpo", "--sde.steps", "10"], "sde.steps is 10"),
        (["--algorithm", "flow_grpo", "--optim.steps_per_iteration", "3"], "optim.steps_per_iteration is 3"),
        (["--device", "warp9"], "device is 'warp9'"),
    ],
)
def test_a_bad_setting_is_named(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["train", "--out", str(tmp_path / "run"), *words])
    assert message in f"{caught.value} {capsys.readouterr().err}"


def _resolved(*words: str) -> TrainConfig:
    return _parse(*resolve_configs(["train", *words])[1:])


def test_an_algorithm_brings_its_settings_and_the_command_line_has_the_last_word() -> None:
    config = _resolved("--flow_dppo.threshold", "0.5", "--algorithm=flow_dppo")
    assert (config.algorithm, config.sde.window, config.flow_dppo.threshold) == ("flow_dppo", "random", 0.5)
    large = _resolved("--algorithm", "flow_dppo", "--config", "sd35_medium")
    assert (large.flow_dppo.threshold, large.rollout.prompts, large.model.resolution) == (1e-6, 64, 512)
    assert _resolved("--seed", "3") == replace(TrainConfig(), seed=3)


@pytest.mark.parametrize("name", ["tiny", "sd35_medium"])
@pytest.mark.parametrize("algorithm", OF_FLOWS)
def test_every_algorithm_has_valid_settings_for_every_config(name: str, algorithm: str) -> None:
    config = _resolved("--config", name, "--algorithm", algorithm)
    assert config.algorithm == algorithm
    assert algorithm == "advantage_flow" or algorithm_settings(name, algorithm) is not None


def test_an_unknown_key_in_a_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("optim:\n  learning_rate: 1.0\n")
    with pytest.raises(SystemExit):
        main(["train", "--config", str(file)])
    assert "learning_rate" in capsys.readouterr().err


def test_train_eval_sample_report_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    main(["train", "--out", str(run), *SMALL])
    assert "held-out score" in capsys.readouterr().out
    assert (run / "report.html").is_file()
    assert load_run_config(str(run)).iterations == 2
    with pytest.raises(SystemExit, match="--resume"):
        main(["train", "--out", str(run), *SMALL])
    main(["train", "--out", str(run), "--resume", *SMALL])
    main(["eval", "--run", str(run)])
    assert "color_attribution" in capsys.readouterr().out
    picture = tmp_path / "samples.png"
    main(
        ["sample", "--run", str(run), "--prompt", "a red circle", "--count", "3", "--steps", "2", "--out", str(picture)]
    )
    assert Image.open(picture).size[0] > Image.open(picture).size[1]
    (run / "report.html").unlink()
    main(["report", "--run", str(run)])
    assert (run / "report.html").is_file()


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    for command in (["eval"], ["report"], ["sample", "--prompt", "a circle"]):
        with pytest.raises(SystemExit, match=str(tmp_path)):
            main([*command, "--run", str(tmp_path)])


def test_the_sd35_config_trains_the_tiny_pipeline(tmp_path: Path) -> None:
    """The settings and the loading code of SD3.5 Medium, with a small model, prompts from files and another reward."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n\na blue square\na red circle\n")
    config = _parse(
        *("--config", str(packaged_configs()["sd35_medium"]), "--model.pipeline", pipeline_folder("embedded")),
        *("--model.resolution", "32", "--model.max_sequence_length", "12", "--rollout.prompts", "2"),
        *("--data.prompts", str(prompts), "--data.eval_prompts", str(prompts), "--evaluation.steps", "2"),
        *("--data.reward", f"{__name__}:MeanRed"),
    )
    assert (config.model.trainable, config.advantage_flow.gamma, config.advantage.clip_mode) == ("lora", 1.1, "clip")
    trainer = Trainer(config)
    row = trainer.iterate(0)
    assert row["grad_norm"] > 0 and row["nonfinite_samples"] == 0
    assert trainer.prompts.prompts == [Prompt("a red circle"), Prompt("a blue square")]
    evaluation = trainer.evaluate()
    assert set(evaluation.categories) == {"all"}
    assert evaluation.each == {} and not any("/" in key for key in row)  # which are there of several rewards


class MeanRed:
    def __call__(self, images: torch.Tensor, prompts: list[Prompt]) -> Scores:
        red = images[:, 0].mean((1, 2)).cpu()
        return Scores(red, red)


def test_a_reward_of_ones_own_loads_by_its_path() -> None:
    assert isinstance(load_reward("advflow.rewards.embedded:EmbeddedReward"), load_reward("embedded").__class__)
