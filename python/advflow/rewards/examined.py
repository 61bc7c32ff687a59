"""A reward before it is made: whether what it would load is there, and which prompts it could score."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

from advflow.data.prompt import Prompt
from advflow.rewards import CheckedReward, WrongArgument, check_arguments, find_class
from advflow.settings.registry import REWARDS
from advflow.settings.rewards import RewardConfig


@dataclass(frozen=True)
class Examined:
    """What is wrong with a reward, a sentence each, and its `check` of a prompt; None where only the made one has it.

    `expect` is told before which prompts will be checked. `remark` says how far the examination went.
    """

    faults: list[str]
    check: Callable[[Prompt], None] | None
    remark: str = ""
    expect: Callable[[list[Prompt]], None] = lambda prompts: None


def examine(config: RewardConfig, settings: object) -> Examined:
    """Looks at the reward of `config`, whose own section is `settings`, and loads no model.

    A class says what it lacks by a static method `lacking`, which takes what the class takes and returns errors. One of
    ours that has none has nothing to load and is made; one of somebody else's is left alone.
    """
    name = config.reward
    try:
        found = find_class(name, config.place)
        own_section = name in REWARDS and REWARDS[name].settings is not None
        if not own_section:
            check_arguments(name, found, config.args, config.arguments)
        lacking = getattr(found, "lacking", None)
        if lacking is not None:
            faults = [_sentence(each, config) for each in lacking(**({} if own_section else config.args))]
            return Examined(faults, _static_check(found))
        if not found.__module__.startswith("advflow.rewards."):
            remark = "not made, since it says by no `lacking` what it would load"
            return Examined([], _static_check(found), remark)
        made = CheckedReward(found(settings) if own_section else found(**config.args))
        return Examined([], made.check, expect=made.expect)
    except ValueError as error:
        return Examined([_sentence(error, config)], None)


def _sentence(error: ValueError, config: RewardConfig) -> str:
    return f"{config.arguments}.{error.sentence}" if isinstance(error, WrongArgument) else str(error)


def _static_check(found: object) -> Callable[[Prompt], None] | None:
    if not hasattr(found, "check"):
        return lambda prompt: None
    check = inspect.getattr_static(found, "check")
    return check.__func__ if isinstance(check, staticmethod) else None
