"""What people type and write into files: taken as meant, or refused in one sentence."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from advflow.cli import main
from advflow.settings.config import TrainConfig
from advflow.settings.sources import load_run_config, packaged_configs, resolve_configs, to_config, train_parser

from tests.trainer.runs import OF_FLOWS

PARSER = train_parser()


def _resolved(*words: str) -> TrainConfig:
    return to_config(PARSER, PARSER.parse_args(resolve_configs(["train", *words])[1:]))


def _refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The first line of what a command that must not run says."""
    with pytest.raises(SystemExit) as caught:
        main(list(words))
    assert caught.value.code not in (0, None)
    said = capsys.readouterr().err or f"{caught.value}"
    assert "Traceback" not in said
    return said.splitlines()[0]


def _leaf(config: TrainConfig, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return list(value) if isinstance(value, tuple) else value


def _leaves(path: Path) -> dict[str, Any]:
    tree = yaml.safe_load(path.read_text()) if path.is_file() else {}
    sections = {f"{s}.{k}": v for s, keys in tree.items() if isinstance(keys, dict) for k, v in keys.items()}
    return sections | {key: value for key, value in tree.items() if not isinstance(value, dict)}


@pytest.mark.parametrize("base", ["tiny", pytest.param("sd35_medium", marks=pytest.mark.slow)])
@pytest.mark.parametrize("algorithm", OF_FLOWS)
def test_a_method_brings_its_own_settings_however_it_is_chosen(base: str, algorithm: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(f"seed: 7\nalgorithm: {algorithm}\n")
    config = _resolved("--config", base, "--algorithm", algorithm)
    own = _leaves(packaged_configs()[base].parent / base / f"{algorithm}.yaml")
    expected = _leaves(packaged_configs()[base]) | own | {"algorithm": algorithm}
    assert {name: _leaf(config, name) for name in expected} == {
        name: float(value) if isinstance(value, str) and name != "algorithm" and value[0].isdigit() else value
        for name, value in expected.items()
    }
    for words in (
        [f"--config={base}", f"--algorithm={algorithm}"],
        ["--algorithm", algorithm, "--config", base],
        ["--algorithm", "awm", "--config", base, f"--algorithm={algorithm}"],
    ):
        assert _resolved(*words) == config
    for words in (
        ["--config", base, "--config", str(file)],
        ["--config", str(file), "--config", base],
        [f"--config={file}", f"--config={base}"],
    ):
        assert _resolved(*words) == replace(config, seed=7)
    if base == "tiny":
        assert _resolved("--config", str(file)) == replace(config, seed=7)


@pytest.mark.parametrize("algorithm", [method for method in OF_FLOWS if method != "advantage_flow"])
def test_base_then_method_then_file_then_command_line(algorithm: str, tmp_path: Path) -> None:
    own = _leaves(packaged_configs()["tiny"].parent / "tiny" / f"{algorithm}.yaml")
    name = next(name for name, value in own.items() if isinstance(value, float) and "." in name)
    section, key = name.split(".")
    file = tmp_path / "mine.yaml"
    file.write_text(f"algorithm: {algorithm}\n{section}:\n  {key}: 0.123\n")
    assert _leaf(_resolved("--config", str(file)), name) == 0.123
    assert _leaf(_resolved("--config", str(file), f"--{name}", "0.321"), name) == 0.321
    assert _leaf(_resolved(f"--{name}=0.321", "--config", str(file)), name) == 0.321
    other = "flow_grpo" if algorithm != "flow_grpo" else "awm"
    config = _resolved("--config", str(file), "--algorithm", other)
    assert (config.algorithm, _leaf(config, name)) == (other, 0.123)


def test_the_last_file_that_names_a_method_names_it(tmp_path: Path) -> None:
    first, last, silent = (tmp_path / name for name in ("1.yaml", "2.yaml", "3.yaml"))
    first.write_text("algorithm: flow_dppo\n")
    last.write_text("algorithm: mix_grpo\n")
    silent.write_text("seed: 1\n")
    words = [word for file in (first, last, silent) for word in ("--config", str(file))]
    assert _resolved(*words) == replace(_resolved("--algorithm", "mix_grpo"), seed=1)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--algo", "flow_grpo"], "there is no option --algo; did you mean '--algorithm'?"),
        (["--algo=flow_grpo"], "there is no option --algo; did you mean '--algorithm'?"),
        (["--optim.l", "1"], "there is no option --optim.l; did you mean '--optim.lr'?"),
        (["--conf", "tiny"], "there is no option --conf; did you mean '--config'?"),
        (["--res"], "there is no option --res; did you mean '--resume'?"),
        (["--lr", "1"], "there is no option --lr; did you mean '--optim.lr'?"),
        (["--advantage_flow.gama", "1"], "there is no option --advantage_flow.gama; did you mean '--advantage_flow.g"),
        (["--algorithm", "flow_gpo"], "algorithm is 'flow_gpo'; did you mean 'flow_grpo'? accepted: 'advantage_flow',"),
        (["--config", "tinny"], "--config is 'tinny', where there is no file; did you mean 'tiny'? accepted: a YAML"),
        (["--config", "a.yaml"], "--config is 'a.yaml', where there is no file; accepted: a YAML file, or"),
        (["--config"], "--config is given without a value"),
        (["--config="], "--config is '', where there is no file; accepted: a YAML file, or one that is built in:"),
        (["--kl_weight", "1"], "there is no option --kl_weight; did you mean '--diffusion_nft.kl_weight' or '--awm"),
        (["--flow_grp.clip", "1"], "there is no option --flow_grp.clip; did you mean '--flow_grpo.clip'?"),
        (["--advantage.clip-mode", "clip"], "there is no option --advantage.clip-mode; did you mean '--advantage.c"),
        (["--", "seed", "3"], "'seed' stands alone; settings are given as --name value"),
        (["--optim.lr", "fast"], "optim.lr is 'fast'; accepted: a number"),
        (["--optim.betas", "[1]"], "optim.betas is '[1]'; accepted: 2 values, [a number, a number]"),
        (["--optim.hold", "soon"], "optim.hold is 'soon'; accepted: an integer or null"),
        (["--optim", "3"], "optim is '3'; accepted: a mapping of lr, warmup,"),
        (["--runtime.fused", "3"], "runtime.fused is '3'; accepted: true or false"),
        (["--draws.noise", "shared"], "draws.noise is 'shared'; did you mean 'shared_in_group'? accepted: 'per_image'"),
        (["--iterations"], "--iterations is given without a value; accepted: an integer"),
        (["--resume", "maybe"], "--resume is 'maybe'; accepted: true or false"),
        (["runs/a"], "'runs/a' stands alone; settings are given as --name value"),
    ],
)  # fmt: skip
def test_a_wrong_command_line_is_one_sentence_first(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _refused(capsys, "train", *words).startswith(f"advflow train: {sentence}")


def test_the_error_comes_first_and_where_to_look_last(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["train", "--optim.lr", "fast"])
    assert caught.value.code == 2
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith("advflow train: optim.lr is") and last == "All options: advflow train --help"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["tran"], "advflow: there is no command 'tran'; did you mean 'train'?"),
        (["zoom"], "advflow: there is no command 'zoom'; accepted: train, eval, sample, export, report, shapes,"),
        ([], "advflow: no command is given; accepted: train, eval, sample, export, report, shapes, reward-server,"),
        (["eval"], "advflow: eval is given without --run"),
        (["eval", "--ru", "x"], "advflow eval: there is no option --ru; did you mean '--run'?"),
        (["sample", "--run", "x"], "advflow: sample is given without --prompt"),
        (["sample", "--run", "x", "--promp", "y"], "advflow sample: there is no option --promp; did you mean '--pro"),
        (["sample", "--run", "x", "--prompt", "y", "--count", "q"], "advflow sample: --count is 'q'; accepted: an int"),
        (["report", "--run"], "advflow report: --run is given without a value"),
        (["pretrain", "--out", "x", "--bach", "3"], "advflow pretrain: there is no option --bach; did you mean '--"),
        (["pretrain", "--out", "x", "--batch", "q"], "advflow pretrain: --batch is 'q'; accepted: an integer"),
    ],
)  # fmt: skip
def test_every_command_says_what_is_wrong(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert _refused(capsys, *words).startswith(sentence)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"seed: 1\noptim:\n  lr: fast\n", "{}: optim.lr is 'fast'; accepted: a number"),
        (b"optim:\n  learning_rate: 1\n", "{}: there is no setting optim.learning_rate; optim has lr, warmup,"),
        (b"optimm:\n  lr: 1\n", "{}: there is no setting optimm; did you mean 'optim'?"),
        (b"lr: 1\n", "{}: there is no setting lr; did you mean 'optim.lr'?"),
        (b"algorithm: flow_gpo\n", "{}: algorithm is 'flow_gpo'; did you mean 'flow_grpo'?"),
        (b"resume: true\n", "{}: there is no setting resume"),
        (b"config: tiny\n", "{}: there is no setting config"),
        (b"optim: 3\n", "{}: optim is 3; accepted: a mapping of lr, warmup,"),
        (b"optim: [1]\n", "{}: optim is [1]; accepted: a mapping of lr, warmup,"),
        (b"optim.lr: 1\noptim:\n  lr: 2\n", "{}: optim.lr is given twice"),
        (b"optim:\n  lr: 1\n  lr: 2\n", "--config is '{}', which is not valid YAML: line 3: lr is given twice, first"),
        (b"seed: 1\nseed: 2\n", "--config is '{}', which is not valid YAML: line 2: seed is given twice, first"),
        (b"optim:\n\tlr: 1\n", "--config is '{}', which is not valid YAML: line 2: a tab where spaces belong"),
        (b"seed: [1\n", "--config is '{}', which is not valid YAML: line 2:"),
        (b"seed: 1\n---\nseed: 2\n", "--config is '{}', which is not valid YAML: line 2:"),
        (b"- seed\n", "--config is '{}', which holds a list; accepted: settings, each as `name: value`"),
        (b"seed\n", "--config is '{}', which holds 'seed'; accepted: settings, each as `name: value`"),
        (b"seed: 1\n# gr\xfcn\n", "--config is '{}', which is not UTF-8 (byte 0xfc in line 2); accepted: UTF-8"),
        ("seed: 1\n".encode("utf-16"), "--config is '{}', which is UTF-16; accepted: UTF-8"),
        (b"seed: 1\n\0\n", "--config is '{}', which has a NUL byte in line 2; accepted: UTF-8 text"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_named(
    content: bytes, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_bytes(content)
    assert _refused(capsys, "train", "--config", str(file)).startswith("advflow train: " + sentence.format(file))


def test_a_folder_is_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "a folder; accepted: a YAML file" in _refused(capsys, "train", "--config", str(tmp_path))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"\xef\xbb\xbfseed: 5\r\nalgorithm: awm\r\n", {"seed": 5, "algorithm": "awm"}),
        (b"# nothing\n", {}),
        (b"", {}),
        (b"optim:\nseed: 3\n", {"seed": 3}),
        (b"optim.lr: 1e-3\n", {"optim.lr": 1e-3}),
        (b"optim: {lr: 1e-3, hold: null}\n", {"optim.lr": 1e-3, "optim.hold": None}),
    ],
)
def test_files_people_have_are_taken(content: bytes, expected: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_bytes(content)
    config = _resolved("--config", str(file))
    assert {name: _leaf(config, name) for name in expected} == expected


def test_a_runs_own_settings_are_read_as_strictly(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    for content, sentence in (
        ("seed: 1\nseed: 2\n", f"--run is '{file}', which is not valid YAML: line 2: seed is given twice"),
        ("sed: 1\n", f"{file}: there is no setting sed; did you mean 'seed'?"),
        ("- 1\n", f"--run is '{file}', which holds a list"),
    ):
        file.write_text(content)
        with pytest.raises(ValueError) as caught:
            load_run_config(str(tmp_path))
        assert str(caught.value).startswith(sentence)


def test_reward_arguments_come_from_file_and_command_line(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("data:\n  reward_args:\n    model: clip\n    scale: 1e-3\n    lr: 3\n")
    config = _resolved("--config", str(file), "--data.reward_args.scale", "2", "--data.reward_args.deep=true")
    assert config.data.reward_args == {"model": "clip", "scale": 2, "lr": 3, "deep": True}
    assert TrainConfig().data.reward_args == {}


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith("advflow 0.") and "advflow-ext" in said and "torch" in said


def test_help_lists_what_is_built_in(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "one that is built in: ar, geneval, ocr, pickscore, sd35_medium, several, shapes, tiny" in said
        and "--data.reward_args" in said
    )


def test_the_command_line_needs_no_torch() -> None:
    code = "import sys, advflow.cli; advflow.cli.train_parser(); assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
