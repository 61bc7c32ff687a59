"""The `advflow` command."""

from __future__ import annotations

import math
import os
import sys
import traceback
from argparse import RawDescriptionHelpFormatter
from contextlib import suppress
from pathlib import Path
from typing import Any

from jsonargparse import DefaultHelpFormatter, Namespace

from advflow.core.cpu_memory import keep_freed_memory
from advflow.core.files import NO_ROOM, new_folder
from advflow.core.provenance import versions
from advflow.run.folder import MAY_CHANGE
from advflow.settings.arguments import Parser
from advflow.settings.numbers import WrongSetting
from advflow.settings.plugins import load_plugins
from advflow.settings.sources import (
    faults_of,
    load_run_config,
    named_plugins,
    plugins_of_run,
    resolve_configs,
    to_config,
    train_parser,
)
from advflow.settings.yaml_files import CONFIG

_DESCRIPTION = """Reinforcement-learning post-training of image models.

examples:
  advflow train                                       post-train the embedded world, CPU, minutes
  advflow train --advantage_flow.gamma 1-A            change settings by their dotted names
  advflow train --algorithm flow_dppo                 another algorithm, with its own settings
  advflow train --config sd35_medium --out runs/sd35  Stable Diffusion 3.5 Medium, the paper's settings
  advflow train --out runs/tiny --resume              go on where a run stopped
  torchrun --nproc_per_node 8 -m advflow train ...    the same on eight GPUs
  advflow train --config ar                           an autoregressive model, by GRPO of its tokens
  advflow eval --run runs/tiny                        held-out score of a run's last checkpoint
  advflow sample --run runs/tiny --prompt "a red circle and a blue square" --count 8
  advflow export --run runs/tiny --out tuned          what a run has learnt, as diffusers loads it
  advflow report --run runs/tiny                      write report.html again
  advflow reward-server --reward pickscore            scores for the trainers of other machines or GPUs, over HTTP
  advflow shapes --out shapes                         prompts of the shapes rule as files, and a page of examples
  advflow pretrain --out pipeline                     make the embedded world's base from nothing"""


_RESUME = f"""go on with the run in --out, where there is one, with its own settings; {", ".join(MAY_CHANGE)} may be
given anew (a learning rate that depends on iterations then follows the new number), any other change is refused"""


def main(argv: list[str] | None = None) -> None:
    """Entry point of the console script."""
    words = sys.argv[1:] if argv is None else argv
    command = words[0] if words else ""
    try:
        arguments = _parse(words)
        _COMMANDS[command](arguments[command])
    except (ValueError, FileNotFoundError) as error:
        if not _is_refusal(error):
            raise
        raise SystemExit(f"advflow {command}: {error}") from error
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        further = "; make room and go on with --resume, what was saved is whole" if command == "train" else ""
        place = f": {error.filename}" if error.filename else ""
        raise SystemExit(f"advflow {command}: {error.strerror}{place}{further}") from error
    except KeyboardInterrupt:
        raise SystemExit(f"advflow {command}: interrupted") from None


def _parse(words: list[str]) -> Namespace:
    """Parses a command line. A run that goes on has its own settings as the base instead of a config's."""
    load_plugins(named_plugins(words))
    arguments = _parser().parse_args(resolve_configs(words))
    if arguments.subcommand == "train" and arguments.train.resume:
        own = Path(arguments.train.out) / CONFIG
        if own.is_file():
            load_plugins(plugins_of_run(own.parent))
            words = [*resolve_configs(words, base=own), "--out", arguments.train.out]
            arguments = _parser().parse_args(words)
    return arguments


def _is_refusal(error: Exception) -> bool:
    """Whether our own code raised it, with nobody else's in between.

    What a user's reward or a library raises keeps its traceback, but for settings that are refused.
    """
    if isinstance(error, WrongSetting):
        return True
    packages = [str(frame.f_globals.get("__package__")) for frame, _ in traceback.walk_tb(error.__traceback__)]
    roots = [package.partition(".")[0] for package in packages]
    ours = ("advflow", "advflow_ext")
    return roots[-1] in ours and set(roots) <= {*ours, "jsonargparse", "torch"}  # these two call ours back


def _parser() -> Parser:
    parser = Parser(prog="advflow", description=_DESCRIPTION, formatter_class=_Formatter, version=_versions())
    commands = parser.add_subcommands(required=True)
    commands.add_subcommand("train", train_parser(_RESUME), help="post-train a pipeline")
    commands.add_subcommand("eval", _eval_parser(), help="score a run, or its base, on held-out prompts")
    commands.add_subcommand("sample", _sample_parser(), help="draw images from a run, or from its base")
    commands.add_subcommand("export", _export_parser(), help="write a run's model as diffusers loads it")
    commands.add_subcommand("report", _report_parser(), help="write a run's report.html")
    commands.add_subcommand("shapes", _shapes_parser(), help="write the prompts of the shapes rule, and examples")
    commands.add_subcommand("reward-server", _serve_parser(), help="serve rewards to trainers, over HTTP")
    commands.add_subcommand("pretrain", _pretrain_parser(), help="pretrain the embedded world's pipeline from nothing")
    return parser


def _versions() -> str:
    """The version, and those of what decides how a run goes."""
    found = versions()
    others = ", ".join(f"{name} {found[name]}" for name in ("advflow-ext", "torch"))
    return f"{found['advflow']} ({others}, Python {found['python']})"


class _Formatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):  # type: ignore[misc]
    """Keeps the line breaks of the examples."""


def _run_argument(parser: Parser) -> None:
    parser.add_argument("--run", type=str, required=True, help="folder of a run")
    parser.add_argument("--base", type=bool, nargs="?", const=True, default=False, help="the model before training")
    parser.add_argument("--checkpoint", type=str, default="last", help='"last", "best" or after how many iterations')


def _guidance_argument(parser: Parser) -> None:
    said = "scale of classifier-free guidance, 1 being none; null: the run's evaluation.guidance"
    parser.add_argument("--guidance", type=float | None, default=None, help=said)


def _eval_parser() -> Parser:
    parser = Parser(
        description="Score a run's last checkpoint on the held-out prompts, as the run itself does, but for what is "
        "given here."
    )
    _run_argument(parser)
    _guidance_argument(parser)
    for name, kind, said in (
        ("eval_prompts", str, "a file of prompts, instead of data.eval_prompts"),
        ("prompts_per_category", int, "instead of evaluation.prompts_per_category"),
        ("steps", int, "Euler steps, instead of evaluation.steps"),
        ("reward", str | dict[str, Any], "one or several, as data.reward has them, instead of it"),
        ("reward_args", dict[str, Any], "of a reward that is given alone"),
        ("out", str, "a new folder for every image, scores.jsonl and summary.json"),
    ):
        parser.add_argument(f"--{name}", type=kind | None, default=None, help=said)
    return parser


def _sample_parser() -> Parser:
    parser = Parser(description="Draw images from a run's last checkpoint.")
    _run_argument(parser)
    parser.add_argument("--prompt", type=str, required=True, help="what to draw")
    parser.add_argument("--count", type=int, default=8, help="how many images")
    parser.add_argument("--steps", type=int, default=10, help="Euler steps")
    _guidance_argument(parser)
    said = "what guidance leads away from; null: the run's rollout.negative_prompt"
    parser.add_argument("--negative_prompt", type=str | None, default=None, help=said)
    parser.add_argument("--seed", type=int, default=0, help="seed of the starting noise")
    parser.add_argument("--out", type=str, default="samples.png", help="where the picture goes")
    return parser


def _export_parser() -> Parser:
    parser = Parser(
        description="Write the model of a run's checkpoint as diffusers loads it: pytorch_lora_weights.safetensors for "
        "pipeline.load_lora_weights, or of a run that trains all weights a folder `transformer`."
    )
    _run_argument(parser)
    parser.add_argument("--out", type=str, required=True, help="a new folder")
    return parser


_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def _report_parser() -> Parser:
    parser = Parser(
        description="Write report.html of a run, finished or not; of several runs, one page that compares them: "
        "advflow report runs/a runs/b"
    )
    parser.add_argument("runs", nargs="*", type=str, default=[], help="folders of runs")
    parser.add_argument("--run", type=str | None, default=None, help="folder of a run")
    parser.add_argument("--out", type=str, default="comparison.html", help="of several runs, where the page goes")
    return parser


def _shapes_parser() -> Parser:
    parser = Parser(description="Write train.jsonl and held_out.jsonl, prompts for the reward `shapes`, and sheet.png.")
    parser.add_argument("--out", type=str, required=True, help="a new folder")
    parser.add_argument("--per_category", type=int, default=128, help="at most so many prompts of each category")
    parser.add_argument("--seed", type=int, default=0, help="which ones, and which scenes")
    return parser


def _serve_parser() -> Parser:
    from advflow.settings.serve import ServeConfig

    parser = Parser(
        description="Serve rewards to trainers, over HTTP: POST /score, /check; GET /rewards, /health, /metrics."
    )
    parser.add_argument("--config", action="config", help="YAML file of these settings")
    parser.add_class_arguments(ServeConfig)
    return parser


def _pretrain_parser() -> Parser:
    from advflow.world.settings import PretrainSettings

    parser = Parser(description="Pretrain the embedded world's pipeline from nothing.")
    parser.add_argument("--out", type=str, required=True, help="folder of the pipeline")
    parser.add_class_arguments(PretrainSettings)
    return parser


def _train(arguments: Namespace) -> None:
    parser = train_parser()
    resume, dry, random = (arguments.pop(flag) for flag in ("resume", "dry_run", "random_weights"))
    arguments.pop("config")
    if random:
        arguments["model"]["random_weights"] = True
    if dry:
        _dry_run(arguments, resume)
        return
    config = to_config(parser, arguments)
    _quiet_libraries()
    keep_freed_memory()
    from advflow.core.ranks import join_ranks
    from advflow.report import write_report
    from advflow.run.train import train

    ranks = join_ranks(config.device, config.runtime.shard)
    _say_if_random(config.model.random_weights and ranks.first, config.out)
    summary = train(config, resume, ranks)
    ranks.close()
    if not ranks.first:
        return
    report = write_report(Path(config.out))
    _say_if_random(config.model.random_weights, config.out)
    print(f"held-out score {summary['base_score']:.3f} -> {summary['final_score']:.3f} ({summary['gain']:+.3f})")
    for category, score in summary["final_categories"].items():
        print(f"  {category:<18} {_score(summary['base_categories'][category])} -> {_score(score)}")
    for name, score in summary["final_rewards"].items():
        print(f"  reward {name:<11} {_score(summary['base_rewards'][name])} -> {_score(score)}")
    if summary["best_score"] > summary["final_score"]:
        print(f"best: {summary['best_score']:.3f} after iteration {summary['best_iteration']}, kept as a checkpoint")
    print(f"report: {report}")


def _dry_run(arguments: Namespace, resume: bool) -> None:
    """For as many processes as torchrun has started, of which the first speaks, or as WORLD_SIZE says."""
    from advflow.core.ranks import processes_asked_for

    rank, size = processes_asked_for()
    if rank:
        return
    faults = faults_of(arguments)
    if len(faults) > 1:  # one alone, and what is between sections, is said as ever
        raise SystemExit("\n".join([*faults, f"not ready: {len(faults)} settings are wrong, above"]))
    config = to_config(train_parser(), arguments)
    _say_if_random(config.model.random_weights, config.out)
    os.environ["HF_HUB_OFFLINE"] = "1"  # no network is asked, and nothing downloaded
    _quiet_libraries()
    from advflow.dry_run.dry_run import dry_run

    found = dry_run(config, resume, size)
    print(found.text())
    if found.faults:
        raise SystemExit(1)


def _say_if_random(random: bool, out: str) -> None:
    if random:
        print(f"RANDOM WEIGHTS: {out} is a trial without a model; no image and no score of it means anything")


def _score(value: float | None) -> str:
    """A category's score; a dash where none of its images got a finite one."""
    return "-" if value is None or not math.isfinite(value) else f"{value:.3f}"


def _check_guidance(arguments: Namespace) -> None:
    if arguments.guidance is not None and not 0 <= arguments.guidance < math.inf:
        raise ValueError(f"--guidance is {arguments.guidance}; accepted: zero, a positive number or null")


def _eval(arguments: Namespace) -> None:
    _check_guidance(arguments)
    out = None if arguments.out is None else _require_new_folder(arguments.out)
    config = load_run_config(arguments.run)
    _say_if_random(config.model.random_weights, config.out)
    _quiet_libraries()
    from advflow.run.inference import evaluate_run, load_judgement, load_run, with_choices

    config = with_choices(config, arguments.as_dict())
    judgement = load_judgement(config)  # a mistake in it is seen before a model is loaded
    run = load_run(Path(arguments.run), config, arguments.base, arguments.checkpoint)
    if out is None:
        result = evaluate_run(run, judgement)
    else:
        with new_folder(out) as folder:
            result = evaluate_run(run, judgement, folder)
    print(f"overall {result.overall:.4f}")
    for category, score in result.categories.items():
        print(f"  {category:<18} {score:.4f}")
    for name, each in result.each.items():
        print(f"  reward {name:<11} {each.overall:.4f}" + (f" ({each.unscored} unscored)" if each.unscored else ""))
    if result.unscored:
        print(f"{result.unscored} images got no finite score and count in no mean")
    if out is not None:
        print(f"wrote {out}")


def _sample(arguments: Namespace) -> None:
    _check_sample(arguments)
    config = load_run_config(arguments.run)
    _say_if_random(config.model.random_weights, config.out)
    _quiet_libraries()
    from advflow.run.inference import draw_images, load_run
    from advflow.run.log import image_grid

    run = load_run(Path(arguments.run), config, arguments.base, arguments.checkpoint)
    images = draw_images(
        run,
        arguments.prompt,
        arguments.count,
        arguments.steps,
        arguments.seed,
        config.evaluation.guidance if arguments.guidance is None else arguments.guidance,
        config.rollout.negative_prompt if arguments.negative_prompt is None else arguments.negative_prompt,
    )
    image_grid(images, columns=min(8, arguments.count)).save(arguments.out)
    print(f"wrote {arguments.out}")


def _check_sample(arguments: Namespace) -> None:
    _check_guidance(arguments)
    for name in ("count", "steps"):
        if arguments[name] < 1:
            raise ValueError(f"--{name} is {arguments[name]}; accepted: 1 or more")
    out = Path(arguments.out)
    if out.suffix.lower() not in _PICTURES:
        raise ValueError(f"--out is {arguments.out!r}; accepted is a file ending in {', '.join(_PICTURES)}")
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise ValueError(f"--out is {arguments.out!r}; accepted is a file in a folder that exists")


def _export(arguments: Namespace) -> None:
    out = _require_new_folder(arguments.out)
    config = load_run_config(arguments.run)
    _say_if_random(config.model.random_weights, config.out)
    _quiet_libraries()
    from advflow.core.tensor_files import as_os_errors
    from advflow.run.inference import load_run

    run = load_run(Path(arguments.run), config, arguments.base, arguments.checkpoint)
    with new_folder(out) as folder, as_os_errors(out):
        run.policies.export(folder)
    _say_written(out)


def _require_new_folder(name: str) -> Path:
    out = Path(name)
    if out.exists() or not out.absolute().parent.is_dir():
        raise ValueError(f"--out is {name!r}; accepted is a new folder in one that exists")
    return out


def _say_written(folder: Path) -> None:
    print(f"wrote {', '.join(str(path) for path in sorted(folder.iterdir()))}")


def _report(arguments: Namespace) -> None:
    from advflow.report import write_comparison, write_report

    runs = [Path(run) for run in (*arguments.runs, arguments.run) if run is not None]
    if not runs:
        raise ValueError("no run is named; accepted: the folder of a run, or of several to compare")
    for run in runs:
        with suppress(ValueError):  # a run whose plugins are elsewhere has a report all the same
            load_plugins(plugins_of_run(run))
    if len(runs) == 1:
        print(f"report: {write_report(runs[0])}")
        return
    out = Path(arguments.out)
    if out.suffix != ".html" or out.is_dir() or not out.absolute().parent.is_dir():
        raise ValueError(f"--out is {arguments.out!r}; accepted is a file ending in .html in a folder that exists")
    write_comparison(runs, out)
    print(f"comparison: {out}")


def _shapes(arguments: Namespace) -> None:
    if arguments.per_category < 1:
        raise ValueError(f"--per_category is {arguments.per_category}; accepted: 1 or more")
    out = _require_new_folder(arguments.out)
    from advflow.shapes.files import write_files

    with new_folder(out) as folder:
        write_files(folder, arguments.per_category, arguments.seed)
    _say_written(out)


def _serve(arguments: Namespace) -> None:
    from advflow.settings.serve import ServeConfig

    arguments.pop("config")
    settings: ServeConfig = ServeConfig(**_serve_parser().instantiate(arguments).as_dict())
    load_plugins(settings.plugins)
    _quiet_libraries()
    keep_freed_memory()
    from advflow.serve.server import serve

    serve(settings)


def _pretrain(arguments: Namespace) -> None:
    from advflow.world.settings import PretrainSettings

    out = Path(arguments.pop("out"))
    settings: PretrainSettings = PretrainSettings(**_pretrain_parser().instantiate(arguments).as_dict())
    _quiet_libraries()
    keep_freed_memory()
    from advflow.world.pretrain import pretrain

    pretrain(out, settings)


def _quiet_libraries() -> None:
    """Keeps notices about optional packages that play no part here out of the progress display."""
    import diffusers
    import transformers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


_COMMANDS = {
    "train": _train,
    "eval": _eval,
    "sample": _sample,
    "export": _export,
    "report": _report,
    "shapes": _shapes,
    "reward-server": _serve,
    "pretrain": _pretrain,
}


if __name__ == "__main__":
    main()
