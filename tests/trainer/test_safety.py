"""What others have written cannot harm: no pickles, no code from settings, no file outside the folder of a run."""

from __future__ import annotations

import ast
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from advflow.cli import main
from advflow.models.sd3 import pipeline_folder
from advflow.rewards import Prompt, Scores, load_reward
from advflow.settings.sources import load_run_config
from advflow.settings.yaml_files import read_yaml

from tests.trainer.runs import SMALL

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [path for room in ("advflow_ext", "python/advflow", "bench") for path in (ROOT / room).rglob("*.py")]
PICKLES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "torch.package"}
# Of torch.distributed, what pickles: objects between processes, and torch.distributed.checkpoint's own files.
UNSAFE_CALLS = re.compile(
    r"torch\.save|.*(gather|broadcast|scatter|send|recv)_object(_list)?|.*\.FileSystem(Reader|Writer)|eval|exec"
    r"|yaml\.(unsafe_|full_)?load(_all)?"
)
SUSPECT = re.compile("load|save|_object|FileSystem|eval|exec")  # last parts of such names
ALLOWED = {
    # Reads with a subclass of SafeLoader, which the test below holds to it.
    ("python/advflow/settings/yaml_files.py", "yaml.load"),
    # Names an exception of torch.load(weights_only=True).
    ("python/advflow/rewards/loading.py", "pickle"),
    ("python/advflow/autoregressive/checkpoints.py", "pickle"),
    ("python/advflow/autoregressive/checkpoints.py", "pickle.UnpicklingError"),
}


def unsafe_places(path: Path) -> Iterator[tuple[str, str]]:
    """What in a file may run code that a file brings, or writes a file that may."""
    name = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found = [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            found = []
        yield from ((name, module) for module in found if module in PICKLES or module.split(".")[0] in PICKLES)
        if not isinstance(node, ast.Call) or not SUSPECT.search(
            getattr(node.func, "attr", getattr(node.func, "id", ""))
        ):
            continue
        called = ast.unparse(node.func)
        options = {option.arg: ast.unparse(option.value) for option in node.keywords}
        if called == "torch.load" and options.get("weights_only") != "True":
            yield name, called
        if UNSAFE_CALLS.fullmatch(called) or options.get("allow_pickle") == "True":
            yield name, called


def test_nothing_of_ours_reads_or_writes_pickles() -> None:
    assert len(SOURCES) > 200
    assert {place for path in SOURCES for place in unsafe_places(path)} == ALLOWED


def test_a_pickle_would_be_noticed(tmp_path: Path) -> None:
    lines = (
        "import pickle", "from dill import loads", "import torch.package", "torch.load(path)", "torch.save(x, path)",
        "torch.load(path, weights_only=False)", "np.load(path, allow_pickle=True)", "yaml.unsafe_load(text)",
        "distributed.all_gather_object(all, one)", "eval(text)", "dcp.FileSystemWriter(path)",
    )  # fmt: skip
    for number, line in enumerate(lines):
        (tmp_path / f"{number}.py").write_text(line)
        assert list(unsafe_places(tmp_path / f"{number}.py")), line
    (tmp_path / "good.py").write_text("torch.load(path, weights_only=True)\nnp.load(path)\nyaml.safe_load(text)")
    assert not list(unsafe_places(tmp_path / "good.py"))


def test_a_pipelines_weights_that_are_pickles_are_not_loaded(tmp_path: Path) -> None:
    folder = shutil.copytree(pipeline_folder("embedded"), tmp_path / "pipeline")
    weights = next((folder / "transformer").glob("*.safetensors"))
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(SystemExit, match="advflow train: model.pipeline is '.*', which cannot be loaded: "):
        main(["train", "--out", str(tmp_path / "run"), "--model.pipeline", str(folder)])


@pytest.mark.parametrize(
    "line",
    [
        'seed: !!python/object/apply:os.system ["touch pwned"]',
        "data: !!python/name:os.system",
        "data: {reward_args: {a: !!python/module:os }}",
        "seed: !mine 3",
    ],
)
def test_a_tag_is_refused_in_a_sentence(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "mine.yaml"
    file.write_text(f"iterations: 3\n{line}\n")
    sentence = (
        r"is '.*mine.yaml', which is not valid YAML: line 2: the tag !.*; accepted are plain values: settings make"
    )
    with pytest.raises(ValueError, match=sentence):
        read_yaml(file, "--config")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]


def test_settings_name_no_class_to_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("data: {class_path: subprocess.Popen, init_args: {args: ls}}\n")
    with pytest.raises(SystemExit):
        main(["train", "--config", str(file), "--out", str(tmp_path / "run")])
    assert "there is no setting data.class_path" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "arguments", "fault"),
    [
        ("os:system", {"command": "touch pwned"}, "is no class"),
        ("subprocess:Popen", {"args": "touch pwned", "shell": True}, "has no method __call__"),
    ],
)
def test_a_reward_is_a_class_that_scores(
    name: str, arguments: dict[str, object], fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"data.reward '{name}' {fault}; accepted: a class with __call__"):
        load_reward(name, arguments)
    assert list(tmp_path.iterdir()) == []


class Any:
    def __call__(self, images: torch.Tensor, prompts: list[Prompt]) -> Scores:
        return Scores(torch.ones(len(prompts)), torch.ones(len(prompts)))


ESCAPES = ("../../escaped", "/escaped", "..\\escaped", "a/b", "\x1b[31m", "<script>", "%s{0}$HOME`touch escaped`")
FILES = re.compile(
    r"config\.yaml|(metrics|evals|starts)\.jsonl|(kernels|summary)\.json|report\.html|tensorboard/events\.out\.tfevents\.\S+"
    r"|samples/(\d{6}\.png|prompts\.json)"
    r"|checkpoints/\d{6}/(state\.json|tensors\.safetensors|transformer/(config\.json|\w+\.safetensors))"
)


def test_prompts_and_their_metadata_name_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home" / "below"
    home.mkdir(parents=True)
    monkeypatch.chdir(home)
    lines = [json.dumps({"prompt": each, "tag": each, each: each, "path": each, "out": each}) for each in ESCAPES]
    (home / "prompts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    words = "--data.prompts prompts.jsonl --data.eval_prompts prompts.jsonl --data.embeddings_cache cache".split()
    main(["train", "--out", "run", *SMALL, *words, "--iterations", "1", "--data.reward", f"{__name__}:Any"])
    written = {str(path.relative_to(home / "run")) for path in (home / "run").rglob("*") if path.is_file()}
    assert len(written) >= 12 and not [path for path in written if not FILES.fullmatch(path)]
    others = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    others -= {f"home/below/run/{path}" for path in written} | {"home/below/prompts.jsonl"}
    assert all(re.fullmatch(r"home/below/cache/[0-9a-f]{32}/[0-9a-f]{32}\.safetensors", path) for path in others)
    assert len(others) == 1 and not Path("/escaped").exists()


@pytest.fixture
def brought(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A run that somebody has given us, in runs/theirs below the current folder, with code beside its settings."""
    before = list(sys.path), set(sys.modules)
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "theirs"
    (run / "deeper").mkdir(parents=True)
    for name in ("brought.py", "deeper/code.py"):
        (run / name).write_text("open('pwned', 'w').close()\nclass Reward:\n    def __call__(self, *_): ...\n")
    yield run
    sys.path[:] = before[0]
    for name in set(sys.modules) - before[1]:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("settings", "module"),
    [
        ("plugins: [runs.theirs.brought]", "runs.theirs.brought"),
        ("plugins: [runs.theirs.deeper.code]", "runs.theirs.deeper.code"),
        ("data: {reward: 'runs.theirs.brought:Reward'}", "runs.theirs.brought"),
        ("data: {reward: {mine: {reward: 'runs.theirs.brought:Reward'}, redness: 1}}", "runs.theirs.brought"),
        ("plugins: [linked]", "linked"),
    ],
)
def test_a_run_does_not_bring_its_own_code(settings: str, module: str, brought: Path) -> None:
    (Path.cwd() / "linked.py").symlink_to(brought / "brought.py")
    (brought / "config.yaml").write_text(f"iterations: 3\n{settings}\n")
    sentence = (
        f"config.yaml names the module '{module}', which lies in the run's own folder; code that comes with a run"
    )
    for words in (["eval", "--run"], ["sample", "--prompt", "a", "--run"], ["export", "--out", "new", "--run"]):
        with pytest.raises(SystemExit, match=f"advflow {words[0]}: .*{sentence}"):
            main([*words, "runs/theirs"])
    with pytest.raises(SystemExit, match=f"advflow train: .*{sentence}"):
        main(["train", "--resume", "--out", "runs/theirs"])
    main(["report", "--run", "runs/theirs"])
    assert not list(Path.cwd().rglob("pwned"))


def test_in_the_folder_of_a_run_its_code_is_not_found(brought: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(brought)
    (brought / "config.yaml").write_text("plugins: [brought]\n")
    with pytest.raises(
        SystemExit, match="advflow eval: .*names the module 'brought', which lies in the run's own folder"
    ):
        main(["eval", "--run", "."])
    assert not list(brought.rglob("pwned"))


def test_code_that_is_here_already_may_be_named(brought: Path) -> None:
    (Path.cwd() / "here_already.py").write_text("")
    (brought / "config.yaml").write_text("plugins: [here_already]\n")
    assert load_run_config("runs/theirs").plugins == ["here_already"] and "here_already" in sys.modules
