"""Where the settings of a run come from: built-in files, the user's own, the command line, and what a run has kept."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from importlib import resources
from pathlib import Path
from typing import Any, get_type_hints

from jsonargparse import Namespace

from advflow.settings.arguments import Parser
from advflow.settings.config import TrainConfig, config_class
from advflow.settings.plugins import load_plugins, refuse_code_of
from advflow.settings.registry import METHODS
from advflow.settings.suggest import did_you_mean
from advflow.settings.yaml_files import CONFIG, read_yaml

_PLUGINS = "--plugins"


def packaged_configs() -> dict[str, Path]:
    """Configs inside the package by name."""
    folder = Path(str(resources.files("advflow"))) / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def algorithm_settings(config: str, algorithm: str) -> Path | None:
    """What the built-in `config` changes for `algorithm`; None where that is nothing."""
    path = packaged_configs()[config].parent / config / f"{algorithm}.yaml"
    return path if algorithm in METHODS and path.is_file() else None


def resolve_configs(argv: list[str], base: Path | None = None) -> list[str]:
    """Puts the settings of `advflow train` in the order in which the later ones win.

    Built-in configs, each followed by what it changes for the algorithm; then the user's files; then the command line,
    whatever its order. The algorithm is that of the command line, else of the last of the user's files to name one.
    The file `base`, where there is one, stands in for the built-in "tiny", which is the base where none is named.
    """
    if argv[:1] == ["reward-server"]:
        return _as_list(argv)
    if argv[:1] != ["train"]:
        return argv
    known = packaged_configs()
    named, rest = _take_option("--config", argv[1:])
    own = [name for name in named if name not in known]
    algorithm = ([_algorithm_of(name) for name in own], _take_option("--algorithm", rest)[0])
    chosen = next((name for names in reversed(algorithm) for name in reversed(names) if name), "")
    files = [] if base is None else [base]
    for name in [name for name in named if name in known] or (["tiny"] if base is None else []):
        files += [known[name], *filter(None, [algorithm_settings(name, chosen)])]
    return ["train", *(word for file in [*files, *own] for word in ("--config", str(file))), *_as_list(rest)]


def named_plugins(argv: list[str]) -> list[str]:
    """The plugins that a command line of `advflow train` names, or else the last of its files to name some.

    The first of these is that of the run that goes on.
    """
    if argv[:1] != ["train"]:
        return []
    files, rest = _take_option("--config", argv[1:])
    if given := _take_option(_PLUGINS, rest)[0]:
        return [name for name in given[-1].strip("[]").replace(" ", "").split(",") if name]
    found: list[list[str]] = []
    if "--resume" in rest:
        out = Path((_take_option("--out", rest)[0] or [TrainConfig.out])[-1])
        found += [plugins_of_run(out)] if (out / CONFIG).is_file() else []
    found += [plugins_of(Path(name)) for name in files if Path(name).is_file()]
    return next((names for names in reversed(found) if names), [])


def plugins_of(file: Path) -> list[str]:
    """The plugins that a file of settings names; what is wrong with the file is said by who parses it."""
    try:
        plugins = read_yaml(file, "--config").get("plugins")
    except ValueError:
        return []
    return plugins if isinstance(plugins, list) else []


def plugins_of_run(folder: Path) -> list[str]:
    """The plugins that a run's config names. Raises ValueError where it names code that lies in the run's folder."""
    file = folder / CONFIG
    try:
        settings = read_yaml(file, "--run")
    except ValueError:  # said by who parses it
        return []
    refuse_code_of(folder, _modules_in(settings))
    return plugins_of(file)


def _modules_in(value: object) -> Iterator[str]:
    """The modules that settings name: as "module:Class", and the plugins."""
    if isinstance(value, dict):
        for name, each in value.items():
            own = name == "plugins" and isinstance(each, list)
            yield from [module for module in each if isinstance(module, str)] if own else _modules_in(each)
    elif isinstance(value, list):
        for each in value:
            yield from _modules_in(each)
    elif isinstance(value, str) and (found := re.fullmatch(r"([\w.]+):\w+", value)):
        yield found[1]


def _as_list(words: list[str]) -> list[str]:
    """`words` with the values of --plugins, which are separated by commas, as YAML has them."""
    values, rest = _take_option(_PLUGINS, words)
    return [*rest, *(word for value in values for word in (_PLUGINS, f"[{value.strip('[]')}]"))]


def _take_option(option: str, words: list[str]) -> tuple[list[str], list[str]]:
    """The values that `option` is given in `words`, and the other words."""
    values, rest, left = [], [], list(words)
    while left:
        word = left.pop(0)
        name, equals, value = word.partition("=")
        if name != option or not (equals or left):
            rest.append(word)
        else:
            values.append(value if equals else left.pop(0))
    return values, rest


def _algorithm_of(name: str) -> str | None:
    """The algorithm that a user's file names. A file that cannot be read is an error of the command line."""
    known = packaged_configs()
    if not name or not Path(name).exists():
        near = did_you_mean(name, known)
        accepted = f"accepted: a YAML file, or one that is built in: {', '.join(known)}"
        train_parser().error(f"--config is {name!r}, where there is no file{near or '; '}{near and ' '}{accepted}")
    try:
        algorithm = read_yaml(Path(name), "--config").get("algorithm")
    except ValueError as error:
        train_parser().error(str(error))
    return algorithm if isinstance(algorithm, str) else None


def train_parser(resume_help: str = "go on with the run in --out") -> Parser:
    """The parser of `advflow train`; also what checks the config.yaml of a finished run."""
    parser = Parser(prog="advflow train", description="Post-train a pipeline by reinforcement learning.")
    names = ", ".join(packaged_configs())
    parser.add_argument("--config", action="config", help=f"YAML file, or one that is built in: {names}")
    for flag, said in (
        ("resume", resume_help),
        (
            "dry_run",
            "look at everything that the run needs, say what is missing and what it will take, and start nothing",
        ),
        ("random_weights", "the same as --model.random_weights true"),
    ):
        parser.add_argument(f"--{flag}", type=bool, nargs="?", const=True, default=False, help=said)
    parser.add_class_arguments(config_class())
    return parser


def faults_of(parsed: Namespace) -> list[str]:
    """What sections of the settings refuse by themselves, the first of each, a sentence each."""
    faults = []
    for name, hint in get_type_hints(config_class()).items():
        if is_dataclass(hint):
            section: Any = hint
            try:
                section(**parsed[name].as_dict())
            except ValueError as error:
                faults.append(str(error))
    return faults


def to_config(parser: Parser, parsed: Namespace) -> TrainConfig:
    values = parser.instantiate(parsed)
    config = config_class()
    return config(**{field.name: values[field.name] for field in fields(config)})


def load_run_config(run: str) -> TrainConfig:
    """The settings a run was started with."""
    path = Path(run) / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"--run is {run!r}; there is no {path}")
    load_plugins(plugins_of_run(Path(run)))
    parser = train_parser()
    parser.exit_on_error = False
    return to_config(parser, parser.parse_path(path, field="--run"))
