"""Rewards: what scores the images of a run.

A reward is any class with the method of `Reward`. Some are built in, a file each here;
"package.module:Class" names your own, looked for in the current folder first. It is made with what `data.reward_args`
holds, or with its own section of the settings where `advflow.settings.registry.REWARDS` names one, and asked for
nothing but what `Reward` says: what it returns is checked here, copied, and never written to. A reward that cannot
score every prompt has a method `check(prompt)`, which raises UnknownPrompt for one that it cannot, and may have
`expect(prompts)`, which is told before which they will be; one whose forward pass cannot take `MOST_AT_ONCE` images has
a number of its own, `batch`. One that scores elsewhere has a method `begin`, which takes what `__call__` does and
returns a Future of its Scores, while images go on being drawn. Several together are `advflow.rewards.several`.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from advflow.data.prompt import Prompt, UnknownPrompt
from advflow.settings.plugins import look_in_current_folder
from advflow.settings.registry import REWARDS
from advflow.settings.suggest import did_you_mean

__all__ = ["CheckedReward", "Prompt", "Reward", "Scores", "UnknownPrompt", "WrongArgument", "load_reward"]

MOST_AT_ONCE = 128
"""Images that a reward scores at a time where neither it nor the settings say."""


@dataclass(frozen=True)
class Scores:
    """One number an image: `reward` is what training maximises, `score` what evaluation reports.

    From a reward, each is a tensor [B] of real numbers, integers or booleans, of any precision and on any device, with
    or without a gradient, made in inference mode or not; or a NumPy array [B], or a list or tuple of B numbers. NaN is
    an image without a score. From `load_reward`'s rewards, both are fp32 [B] on the CPU, and nobody else's.
    """

    reward: torch.Tensor
    score: torch.Tensor


class Reward(Protocol):
    def __call__(self, images: torch.Tensor, prompts: list[Prompt]) -> Scores:
        """Scores `images`, fp32 [B, 3, H, W] in [0, 1], each against the prompt at the same place.

        The images are for reading: they are shown and stored after this.
        """
        ...


class WrongArgument(ValueError):
    """Raised by a built-in reward for an argument that is of no use; `load_reward` says where it stands."""

    def __init__(self, argument: str, given: object, problem: str) -> None:
        super().__init__(argument, given, problem)
        self.sentence = f"{argument} is {given!r}{problem}"


class CheckedReward:
    """A reward whose answers keep to the contract, and who sees at most `batch` images at a time.

    Raises ValueError, naming the reward and what it returned.
    """

    def __init__(self, reward: Reward, batch: int | None = None) -> None:
        self._reward = reward
        self.name = f"{type(reward).__module__}:{type(reward).__qualname__}"
        self.batch = getattr(reward, "batch", MOST_AT_ONCE) if batch is None else batch
        if not isinstance(self.batch, int) or isinstance(self.batch, bool) or self.batch < 1:
            raise ValueError(f"reward {self.name} has batch = {self.batch!r}; accepted is how many images it scores")

    def __call__(self, images: torch.Tensor, prompts: list[Prompt]) -> Scores:
        return self.begin(images, prompts).result()

    @property
    def elsewhere(self) -> bool:
        """Whether it scores in the background."""
        return hasattr(self._reward, "begin")

    def begin(self, images: torch.Tensor, prompts: list[Prompt]) -> Begun:
        """As a call. Of a reward that scores elsewhere, the scores need not be there yet when this returns."""
        begin = getattr(self._reward, "begin", self._score)
        parts = [slice(start, start + self.batch) for start in range(0, len(prompts), self.batch)]
        return Begun(self, [(begin(images[rows], list(prompts[rows])), len(prompts[rows])) for rows in parts])

    def _score(self, images: torch.Tensor, prompts: list[Prompt]) -> Future[Scores]:
        scores: Future[Scores] = Future()
        # Copied at once: the next call may write into the same tensor.
        scores.set_result(self.checked(self._reward(images, prompts), len(prompts)))
        return scores

    def checked(self, scores: object, count: int) -> Scores:
        """What the reward has returned for `count` images, where that keeps to the contract."""
        if not isinstance(scores, Scores):
            raise ValueError(
                f"reward {self.name} returned {_described(scores)}; accepted: advflow.rewards.Scores(reward, score)"
            )
        return Scores(*(self._numbers(name, getattr(scores, name), count) for name in ("reward", "score")))

    def _numbers(self, name: str, values: object, count: int) -> torch.Tensor:
        """A fresh fp32 [count] on the CPU."""
        tensor = _as_tensor(values)
        if tensor is None or tensor.shape != (count,):
            raise ValueError(
                f"reward {self.name} returned Scores whose {name} is {_described(values)}; accepted: one real number "
                f"for each image, as a tensor or array of shape [{count}] or a list of {count}"
            )
        return tensor.detach().to("cpu", torch.float32, copy=True)

    def expect(self, prompts: list[Prompt]) -> None:
        """Says which prompts will be checked, one by one."""
        if expect := getattr(self._reward, "expect", None):
            expect(prompts)

    @property
    def checks(self) -> bool:
        """Whether there are prompts that it cannot score."""
        return hasattr(self._reward, "check")

    def check(self, prompt: Prompt) -> None:
        """Raises UnknownPrompt for one that the reward cannot score."""
        if check := getattr(self._reward, "check", None):
            check(prompt)


class Begun:
    """Scores that a reward has been asked for, a Future for each part of the images."""

    def __init__(self, reward: CheckedReward, parts: list[tuple[Future[Scores], int]]) -> None:
        self._reward, self._parts = reward, parts
        self.futures = [future for future, _ in parts]

    def result(self) -> Scores:
        """The scores, when they are there, in the order of the images."""
        parts = [self._reward.checked(future.result(), count) for future, count in self._parts]
        return Scores(torch.cat([part.reward for part in parts]), torch.cat([part.score for part in parts]))


def _as_tensor(values: object) -> torch.Tensor | None:
    """`values` as a dense tensor of real numbers; None where they are none."""
    if isinstance(values, np.ndarray | list | tuple):
        try:
            values = torch.tensor(np.copy(values) if isinstance(values, np.ndarray) else values)
        except (TypeError, ValueError, OverflowError, RuntimeError):
            return None
    if not isinstance(values, torch.Tensor) or values.layout != torch.strided:
        return None
    return None if values.is_meta or values.is_quantized or values.is_complex() else values


def _described(value: object) -> str:
    """What `value` is, in a few words."""
    if value is None or isinstance(value, bool | int | float | str):
        return f"{value!r:.60}"
    kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype} and shape {list(value.shape)}"
    if isinstance(value, torch.Tensor):
        form = "" if value.layout == torch.strided else f"{value.layout} "
        where = "" if value.device.type == "cpu" else f" on {value.device}"
        return f"a {form}tensor of {value.dtype} and shape {list(value.shape)}{where}".replace("torch.", "")
    if isinstance(value, list | tuple):
        odd = next((each for each in value if not isinstance(each, bool | int | float)), None)
        inside = f", with {_described(odd)} in it" if odd is not None or None in value else ""
        return f"a {kind} of {len(value)}{inside}"
    return f"a {kind}"


def load_reward(
    name: str,
    arguments: Mapping[str, Any] | None = None,
    settings: object = None,
    *,
    batch: int | None = None,
    place: str = "data.reward",
    arguments_place: str = "data.reward_args",
) -> CheckedReward:
    """Makes the reward called `name` with `arguments`, or, where it has a section of the settings, with `settings`.

    The two places are where the settings have the name and the arguments. Raises ValueError where there is no such
    reward, where its class does not take the arguments, and where it has not the method of one. What its module or its
    constructor raise is theirs, and passes.
    """
    arguments = arguments or {}
    if name in REWARDS and REWARDS[name].settings is not None:
        if arguments:
            section = REWARDS.section_of(name)
            raise ValueError(f"{arguments_place} is given, and the reward {name!r} has its settings in {section}")
        reward = REWARDS.make(name, settings)
    else:
        make = find_class(name, place)
        check_arguments(name, make, arguments, arguments_place)
        try:
            reward = make(**arguments)
        except WrongArgument as error:
            raise ValueError(f"{arguments_place}.{error.sentence}") from error
    if not callable(reward):
        raise ValueError(f"{place} {name!r} has no method __call__; accepted: a class with __call__")
    return CheckedReward(reward, batch)


def find_class(name: str, place: str) -> Any:
    """The class called `name`, by a setting at `place`. Raises ValueError where there is none."""
    code = REWARDS[name].code if name in REWARDS else name
    if not isinstance(code, str):
        return code
    module_name, colon, class_name = code.partition(":")
    if not colon or not all(part.isidentifier() for part in [*module_name.split("."), class_name]):
        known = ", ".join(map(repr, REWARDS))
        near = did_you_mean(name, REWARDS)
        raise ValueError(f'{place} is {name!r}{near or ";"} accepted: {known} or a dotted path "package.module:Class"')
    look_in_current_folder()
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there; one that it imports is not
        raise ValueError(f"{place} {name!r} cannot be loaded: there is no module {error.name!r}") from error
    if not callable(found := getattr(module, class_name, None)):
        near = did_you_mean(class_name, [each for each, value in vars(module).items() if isinstance(value, type)])
        raise ValueError(
            f"{place} {name!r} cannot be loaded: {module.__file__ or module_name} has no class {class_name!r}{near}"
        )
    _require_reward_class(name, found, place)
    return found


def _require_reward_class(name: str, found: object, place: str) -> None:
    """Before anything is called: a name in a file of settings must not be that of any function there is."""
    fault = "is no class" if not isinstance(found, type) else ""
    if isinstance(found, type) and not any("__call__" in vars(each) for each in found.__mro__):
        fault = "has no method __call__"
    if fault:
        raise ValueError(f"{place} {name!r} {fault}; accepted: a class with __call__")


def check_arguments(name: str, make: Any, arguments: Mapping[str, Any], place: str) -> None:
    """Raises ValueError where the class called `name` does not take `arguments`, which stand at `place`."""
    try:
        parameters = inspect.signature(make).parameters.values()
    except (TypeError, ValueError):  # what is not written in Python need not say what it takes
        return
    named = [each for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)]
    known = [each.name for each in named]
    takes = f"reward {name!r} takes {', '.join(map(str, named)) or 'no arguments'}"
    if not any(each.kind == each.VAR_KEYWORD for each in parameters):
        for argument in arguments:
            if argument not in known:
                near = did_you_mean(argument, known)
                raise ValueError(f"there is no {place}.{argument}{near or ';'} {takes}")
    for each in named:
        if each.default is each.empty and each.name not in arguments:
            raise ValueError(f"{place}.{each.name} is missing; {takes}")
