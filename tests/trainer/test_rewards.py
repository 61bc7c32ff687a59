"""The contract of a reward: what it may return, what is refused, and whose errors are whose."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from advflow.cli import main
from advflow.rewards import Prompt, Scores, UnknownPrompt, load_reward

SMALL = (
    "--iterations 1 --rollout.prompts 2 --rollout.images_per_prompt 2 --rollout.steps 1 --draws.per_image 1 "
    "--evaluation.prompts_per_category 1 --evaluation.steps 1"
).split()
HERE = f"{__name__}:Chosen"
VALUES = [0.0, 1.0, 2.0]
ABC = [Prompt("a"), Prompt("b"), Prompt("c")]


def _inference_tensor() -> torch.Tensor:
    with torch.inference_mode():
        return torch.tensor(VALUES)


class Chosen:
    """Returns what it was made with."""

    def __init__(self, returns: object, group: object = "all", *, unused: float = 1.0) -> None:
        self._returns = returns

    def __call__(self, images: torch.Tensor, prompts: list[Prompt]) -> Any:
        return self._returns


TAKEN = {
    "fp32": lambda: torch.tensor(VALUES),
    "fp64": lambda: torch.tensor(VALUES, dtype=torch.float64),
    "half": lambda: torch.tensor(VALUES, dtype=torch.float16),
    "bf16": lambda: torch.tensor(VALUES, dtype=torch.bfloat16),
    "integers": lambda: torch.tensor([0, 1, 2]),
    "bytes": lambda: torch.tensor([0, 1, 2], dtype=torch.uint8),
    "strided": lambda: torch.arange(6.0)[::2] / 2,
    "gradient": lambda: torch.tensor(VALUES, requires_grad=True),
    "parameter": lambda: torch.nn.Parameter(torch.tensor(VALUES)),
    "inference": _inference_tensor,
    "numpy": lambda: np.array(VALUES),
    "numpy backwards": lambda: np.array(VALUES[::-1])[::-1],
    "numpy read-only": lambda: np.broadcast_to(np.float32(1.0), 3) * np.array(VALUES, np.float32),
    "numpy integers": lambda: np.arange(3),
    "list": lambda: [0, 1.0, 2],
    "tuple": lambda: (False, True, 2.0),
    "list of numbers of others": lambda: [np.float64(0.0), torch.tensor(1.0), 2],
}


@pytest.mark.parametrize("kind", TAKEN)
def test_every_kind_of_number_is_taken_and_copied(kind: str) -> None:
    theirs = TAKEN[kind]()
    scores = load_reward(HERE, {"returns": Scores(theirs, theirs)})(
        torch.rand(3, 3, 4, 4), [Prompt("a"), Prompt("b"), Prompt("c")]
    )
    for column in (scores.reward, scores.score):
        assert column.dtype == torch.float32 and column.device.type == "cpu" and column.tolist() == VALUES
        assert not column.requires_grad and not column.is_inference()
    scores.reward.fill_(torch.nan)  # as the trainer does for a broken image
    assert scores.score.tolist() == VALUES
    assert [float(torch.as_tensor(value).detach()) for value in theirs] == VALUES


def test_booleans_count_as_zero_and_one_and_nan_stays() -> None:
    scores = load_reward(HERE, {"returns": Scores(torch.tensor([False, True]), [torch.nan, 1])})(
        torch.rand(2, 3, 4, 4), ABC[:2]
    )
    assert scores.reward.tolist() == [0.0, 1.0] and scores.score.isnan().tolist() == [True, False]


REFUSED = {
    "None": (lambda: None, "returned None; accepted: advflow.rewards.Scores(reward, score)"),
    "bare tensor": (lambda: torch.ones(3), "returned a tensor of float32 and shape [3]; accepted: advflow.rewards.Sc"),
    "bare list": (lambda: [1.0, 2.0, 3.0], "returned a list of 3; accepted: advflow.rewards.Scores"),
    "bare number": (lambda: 1, "returned 1; accepted: advflow.rewards.Scores"),
    "pair": (lambda: (torch.ones(3), torch.ones(3)), "returned a tuple of 2, with a tensor of float32 and shape [3] "),
    "dict": (lambda: {"reward": 1}, "returned a dict; accepted: advflow.rewards.Scores"),
    "count": (lambda: Scores(torch.ones(2), torch.ones(3)), "whose reward is a tensor of float32 and shape [2]"),
    "count of scores": (lambda: Scores(torch.ones(3), [1.0]), "whose score is a list of 1; accepted: one real number"),
    "column": (lambda: Scores(torch.ones(3, 1), torch.ones(3)), "whose reward is a tensor of float32 and shape [3, 1]"),
    "scalar": (lambda: Scores(torch.tensor(1.0), torch.ones(3)), "whose reward is a tensor of float32 and shape []"),
    "number": (lambda: Scores(1.0, torch.ones(3)), "whose reward is 1.0; accepted: one real number for each image, as"),
    "complex": (lambda: Scores(torch.ones(3) * 1j, torch.ones(3)), "whose reward is a tensor of complex64 and shape"),
    "complex list": (lambda: Scores([1j, 1, 1], torch.ones(3)), "whose reward is a list of 3, with a complex in it"),
    "None inside": (lambda: Scores(torch.ones(3), [1.0, None, 1.0]), "whose score is a list of 3, with None in it"),
    "strings": (lambda: Scores(["1", "2", "3"], torch.ones(3)), "whose reward is a list of 3, with '1' in it"),
    "objects": (lambda: Scores(np.array([None] * 3), torch.ones(3)), "whose reward is an array of object and shape"),
    "nothing": (lambda: Scores(None, torch.ones(3)), "whose reward is None; accepted"),
    "meta": (lambda: Scores(torch.ones(3, device="meta"), torch.ones(3)), "float32 and shape [3] on meta"),
    "sparse": (lambda: Scores(torch.ones(3).to_sparse(), torch.ones(3)), "whose reward is a sparse_coo tensor of"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_anything_else_is_refused_by_the_rewards_name(kind: str) -> None:
    make, sentence = REFUSED[kind]
    with pytest.raises(ValueError) as caught:
        load_reward(HERE, {"returns": make()})(torch.rand(3, 3, 4, 4), ABC)
    assert str(caught.value).startswith(f"reward {HERE} ") and sentence in str(caught.value)


@pytest.mark.parametrize(
    ("name", "arguments", "sentence"),
    [
        ("beauty", {}, "data.reward is 'beauty'; accepted: 'embedded', 'shapes', 'redness',"),
        ("pickscor", {}, "data.reward is 'pickscor'; did you mean 'pickscore'? accepted: 'embedded',"),
        ("my/reward.py:Mine", {}, "data.reward is 'my/reward.py:Mine'; accepted: 'embedded',"),
        (":Mine", {}, "data.reward is ':Mine'; accepted: 'embedded',"),
        ("nowhere.at:All", {}, "data.reward 'nowhere.at:All' cannot be loaded: there is no module 'nowhere'"),
        (f"{__name__}:Chose", {}, f"cannot be loaded: {__file__} has no class 'Chose'; did you mean 'Chosen'?"),
        (f"{__name__}:VALUES", {}, f"cannot be loaded: {__file__} has no class 'VALUES'"),
        (HERE, {"returns": 1, "grup": 2}, "there is no data.reward_args.grup; did you mean 'group'? reward"),
        (HERE, {}, f"data.reward_args.returns is missing; reward '{HERE}' takes returns: 'object', group: 'object' ="),
        ("embedded", {"x": 1}, "there is no data.reward_args.x; reward 'embedded' takes no arguments"),
        ("pickscore", {"modle": "x"}, "there is no data.reward_args.modle; did you mean 'model'? reward 'pickscore'"),
        ("builtins:dict", {}, "data.reward 'builtins:dict' has no method __call__; accepted: a class with __call__"),
    ],
)  # fmt: skip
def test_a_reward_that_cannot_be_made_is_named(name: str, arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as caught:
        load_reward(name, arguments)
    assert sentence in str(caught.value)


def test_a_reward_that_takes_anything_gets_it() -> None:
    reward = load_reward(f"{__name__}:Anything", {"a": 1, "b": 2})
    assert reward(torch.rand(1, 3, 4, 4), [Prompt("x")]).reward.tolist() == [2.0]


class Anything:
    def __init__(self, **settings: int) -> None:
        self._settings = settings

    def __call__(self, images: torch.Tensor, prompts: list[Prompt]) -> Scores:
        return Scores([len(self._settings)] * len(prompts), torch.ones(len(prompts)))


REWARD_FILE = """
import torch
from advflow.rewards import Scores

class Red:
    def __init__(self, scale=1.0, fail=None):
        self.scale = scale
        if fail == "made":
            raise ValueError("boom when made")
        self.fail = fail

    def __call__(self, images, prompts):
        if self.fail == "called":
            raise ValueError("boom when called")
        with torch.inference_mode():
            red = images[:, 0].mean((1, 2)) * self.scale
        return Scores(red, (red > 0.5).long())
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with a reward of one's own, and not where Python looks for modules by itself."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(tmp_path))])
    (tmp_path / "my_red_reward.py").write_text(REWARD_FILE)
    (tmp_path / "my_broken_reward.py").write_text("import something_that_is_not_there\n")
    (tmp_path / "my_raising_reward.py").write_text("raise ValueError('boom when imported')\n")
    yield tmp_path
    for name in ("my_red_reward", "my_broken_reward", "my_raising_reward"):
        sys.modules.pop(name, None)


def test_a_reward_in_the_current_folder_trains_with_its_arguments(folder: Path) -> None:
    reward = load_reward("my_red_reward:Red", {"scale": 2})
    assert reward(torch.full((1, 3, 4, 4), 0.25), [Prompt("x")]).reward.tolist() == [0.5]
    main(["train", "--out", "run", "--data.reward", "my_red_reward:Red", "--data.reward_args.scale", "2", *SMALL])
    assert (folder / "run" / "report.html").is_file()


def test_the_console_script_finds_it_too(folder: Path) -> None:
    code = "import advflow.rewards as r; print(r.load_reward('my_red_reward:Red').name)"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "my_red_reward:Red\n"


@pytest.mark.parametrize(
    ("name", "fail", "kind", "message"),
    [
        ("my_red_reward:Red", "called", ValueError, "boom when called"),
        ("my_red_reward:Red", "made", ValueError, "boom when made"),
        ("my_raising_reward:Red", None, ValueError, "boom when imported"),
        ("my_broken_reward:Red", None, ModuleNotFoundError, "something_that_is_not_there"),
    ],
)
def test_what_a_reward_raises_keeps_its_traceback(
    folder: Path, name: str, fail: str | None, kind: type[Exception], message: str
) -> None:
    words = [f"--data.reward_args.fail={fail}"] if fail else []
    with pytest.raises(kind, match=message) as caught:
        main(["train", "--out", "run", "--data.reward", name, *words, *SMALL])
    assert Path(caught.traceback[-1].path).parent == folder


def test_a_broken_contract_is_a_sentence_of_the_command(folder: Path) -> None:
    (folder / "my_red_reward.py").write_text(
        REWARD_FILE.replace("return Scores(red, (red > 0.5).long())", "return red")
    )
    with pytest.raises(
        SystemExit, match="^advflow train: reward my_red_reward:Red returned a tensor of float32 and shape"
    ):
        main(["train", "--out", "run", "--data.reward", "my_red_reward:Red", *SMALL])


def test_the_embedded_reward_names_a_prompt_it_does_not_know() -> None:
    reward = load_reward("embedded")
    reward.check(Prompt("a red circle"))
    with pytest.raises(
        UnknownPrompt, match="the reward 'embedded' scores the prompts of the embedded world alone.*'a dog'"
    ):
        reward.check(Prompt("a dog"))
    with pytest.raises(UnknownPrompt, match="a dog"):
        reward(torch.rand(1, 3, 32, 32), [Prompt("a dog")])


def test_pickscore_that_is_nowhere_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="data.reward_args.model is '.*nowhere', which cannot be loaded"):
        load_reward("pickscore", {"model": str(tmp_path / "nowhere")})
